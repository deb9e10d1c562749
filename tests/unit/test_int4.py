"""Packed weights stand for the numbers they should, in every kernel and every kind of model."""

import copy
import errno
import mmap

import gguf
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, MambaConfig

from streaming.errors import ModelUnavailable
from streaming.models import int4, kernels, packing, parallel
from streaming.models.device import choose_int4
from tests.gguf_files import random_blocks
from tests.packed import WITH_STEP, WITHOUT_STEP, pack_model, random_model

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 3])
def n_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def packed_and_float(rows: int, columns: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(rows * columns)
    packed = packing.quantize(torch.randn(rows, columns), bits)
    return packed, packing.unpack(packed, rows)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_ggml_blocks_are_packed_without_loss(kind):
    ggml_type = gguf.GGMLQuantizationType[kind]
    weight = np.random.default_rng(0).standard_normal((37, 96)).astype(np.float32)
    blocks = gguf.quants.quantize(weight, ggml_type)
    packed = packing.pack_ggml(torch.from_numpy(blocks), int(ggml_type))
    assert np.array_equal(packing.unpack(packed, 37).numpy(), gguf.quants.dequantize(blocks, ggml_type))


def test_q4_k_blocks_are_packed_in_4_bits_nearer_than_8_bits_would_be():
    ggml_type = gguf.GGMLQuantizationType.Q4_K
    blocks = random_blocks("Q4_K", (37, 512))
    exact = torch.from_numpy(gguf.quants.dequantize(blocks, ggml_type))
    packed = packing.pack_ggml(torch.from_numpy(blocks), int(ggml_type))
    assert packing.bits_of(packed) == 4
    error, error_of_8_bits = (
        (packing.unpack(weight, 37) - exact).abs().max() for weight in (packed, packing.quantize(exact, 8))
    )
    assert error < 2**-10 * exact.abs().max()
    assert error < error_of_8_bits / 4


@example(2, 1, 1e-3, -0.5)
@given(st.integers(1, 40), st.integers(1, 4), st.floats(1e-3, 1e3), st.floats(-10, 10))
def test_rounding_is_off_by_half_a_step_at_most(rows, groups, scale, offset):
    torch.manual_seed(rows)
    weight = (torch.rand(rows, groups * 32) + offset) * scale
    ranges = weight.view(rows, groups, 32)
    for bits, half_step in (
        (4, (ranges.amax(-1) - ranges.amin(-1)) / 15 * 2),  # the search may give up the ends for the middle
        (8, ranges.abs().amax(-1) / 127 / 2),
    ):
        error = (packing.unpack(packing.quantize(weight, bits), rows) - weight).view(rows, groups, 32).abs().amax(-1)
        # A scale is float16, whose own steps are 2**-24 however small it is.
        rounded_scale = ranges.abs().amax(-1) * 2**-9 + 2**bits * 2**-25
        assert (error <= half_step + rounded_scale).all()


def test_a_constant_group_is_kept():
    weight = torch.full((16, 32), 0.5)
    for bits in (4, 8):
        assert torch.allclose(packing.unpack(packing.quantize(weight, bits), 16), weight, rtol=2e-3)


def test_columns_that_do_not_fill_groups_are_refused():
    with pytest.raises(ValueError, match="divide by 32"):
        packing.quantize(torch.zeros(16, 40), 4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (100, 96), (48, 1536)])
@pytest.mark.parametrize("n_inputs", [1, 5, 40])
def test_both_products_are_those_of_the_unpacked_weight(bits, rows, columns, n_inputs, n_threads):
    packed, weight = packed_and_float(rows, columns, bits)
    x = torch.randn(n_inputs, columns)
    exact = x.double() @ weight.double().T
    limit = (x.abs().double() @ weight.abs().double().T).max() * 1e-4
    for product in (kernels.multiply, kernels.multiply_unpacked):
        assert ((product(packed, x)[:, :rows] - exact).abs() <= limit).all(), product.__name__


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_activations_of_any_size_are_multiplied(scale):
    packed, weight = packed_and_float(16, 64, 4)
    x = torch.randn(1, 64) * scale
    exact = x.double() @ weight.double().T
    assert torch.allclose(kernels.multiply(packed, x).double(), exact, rtol=1e-3, atol=scale * 1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_are_taken_as_an_embedding_takes_them(bits):
    packed, weight = packed_and_float(100, 96, bits)
    ids = torch.tensor([[0, 15, 16], [99, 42, 0]])
    assert torch.allclose(kernels.take_rows(packed, ids), weight[ids], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_inputs", [1, 50])
def test_a_packed_linear_is_a_linear(dtype, n_inputs):
    linear = int4.PackedLinear(64, 40, bias=True, bits=4)
    packed, weight = packed_and_float(40, 64, 4)
    linear.weight.data, linear.bias.data = packed, torch.randn(40)
    x = torch.randn(2, n_inputs, 64).to(dtype)
    y = linear(x)
    assert y.shape == (2, n_inputs, 40)
    assert y.dtype == dtype
    expected = torch.nn.functional.linear(x.float(), weight, linear.bias)
    assert torch.allclose(y.float(), expected, atol=1e-2, rtol=1e-3 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("name", [*WITH_STEP, *WITHOUT_STEP])
def test_every_model_is_quantized_while_it_loads_and_is_saved_packed(name, tmp_path):
    model = random_model((WITH_STEP | WITHOUT_STEP)[name])
    model.save_pretrained(tmp_path / "float")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=int4.Int4Config())
    kinds = [type(module) for module in loaded.modules()]
    assert int4.PackedLinear in kinds
    assert loaded.dtype == torch.float32
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits, exact = loaded(ids).logits, model(ids).logits
    assert (logits - exact).norm() < 0.25 * exact.norm()

    loaded.save_pretrained(tmp_path / "packed")
    assert AutoConfig.from_pretrained(tmp_path / "packed").quantization_config["quant_method"] == int4.METHOD
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, logits)


def test_packing_a_loaded_model_gives_what_loading_it_packed_gives(tmp_path):
    model = random_model(WITH_STEP["llama tied"])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=int4.Int4Config())
    packed = pack_model(copy.deepcopy(model))
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(packed(ids).logits, loaded(ids).logits)
    assert packed.lm_head.weight.data_ptr() == packed.model.embed_tokens.weight.data_ptr()
    assert not any(isinstance(module, torch.nn.Linear) for module in packed.modules())


def test_what_does_not_pack_is_left_alone(tmp_path):
    config = copy.deepcopy(WITH_STEP["llama"])
    config.intermediate_size = 72
    random_model(config).save_pretrained(tmp_path)
    keep = int4.Int4Config(modules_to_not_convert=["o_proj"])
    layer = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=keep).model.layers[0]
    assert type(layer.self_attn.o_proj) is torch.nn.Linear
    assert type(layer.mlp.down_proj) is torch.nn.Linear
    assert type(layer.mlp.gate_proj) is int4.PackedLinear


@pytest.mark.parametrize("name", ["llama", "llama tied"])
@pytest.mark.parametrize("kept", ["lm_head", "embed_tokens"])
def test_the_head_and_the_embedding_are_left_alone_together(tmp_path, name, kept):
    model = random_model(WITH_STEP[name])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=int4.Int4Config([kept]))
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert (loaded(ids).logits - model(ids).logits).norm() < 0.25 * model(ids).logits.norm()
    assert (type(loaded.lm_head), type(loaded.model.embed_tokens)) == (torch.nn.Linear, torch.nn.Embedding)
    assert type(loaded.model.layers[0].mlp.gate_proj) is int4.PackedLinear


def test_a_system_without_large_pages_still_packs(monkeypatch):
    class WithoutLargePages(mmap.mmap):
        def madvise(self, option):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", WithoutLargePages)
    packed = pack_model(random_model(WITH_STEP["llama"]))
    assert packed(torch.arange(3, 20)[None]).logits.isfinite().all()


def test_a_model_without_linears_is_refused_in_a_sentence(tmp_path):
    config = copy.deepcopy(WITH_STEP["llama"])
    config.hidden_size, config.intermediate_size, config.num_attention_heads, config.head_dim = 72, 72, 1, 72
    with pytest.raises(ModelUnavailable, match="no linear layers that can be quantized"):
        pack_model(random_model(config))


def test_a_model_that_rounds_to_the_dtype_of_its_weights_is_refused_in_a_sentence():
    config = MambaConfig(vocab_size=259, hidden_size=64, num_hidden_layers=1, state_size=4)
    model = pack_model(random_model(config))
    with pytest.raises(ModelUnavailable, match="cannot run with packed weights; use --quantize none"):
        model(torch.arange(3, 20)[None])


def test_another_device_is_refused_in_a_sentence(tmp_path):
    random_model(WITH_STEP["llama"]).save_pretrained(tmp_path)
    with pytest.raises(ModelUnavailable, match="run on the CPU only"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=int4.Int4Config(), device_map={"": "cuda:0"})


def test_auto_packs_on_a_cpu_unless_told_otherwise(monkeypatch):
    assert choose_int4("auto", "auto", CPU, is_quantized=False)
    assert choose_int4("int4", "auto", CPU, is_quantized=False)
    assert not choose_int4("none", "auto", CPU, is_quantized=False)
    assert not choose_int4("auto", "float32", CPU, is_quantized=False)
    assert not choose_int4("auto", "auto", CPU, is_quantized=True)
    assert not choose_int4("auto", "auto", torch.device("cuda"), is_quantized=False)
    with pytest.raises(ModelUnavailable, match="quantized already"):
        choose_int4("int4", "auto", CPU, is_quantized=True)
    with pytest.raises(ModelUnavailable, match="run on the CPU, not on cuda"):
        choose_int4("int4", "auto", torch.device("cuda"), is_quantized=False)
    assert choose_int4("int4", "float32", CPU, is_quantized=False)
    for dtype in ("bfloat16", "float16"):
        with pytest.raises(ModelUnavailable, match=r"float32.*--dtype auto.*--quantize none\.$"):
            choose_int4("int4", dtype, CPU, is_quantized=False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx2": True})
    assert not choose_int4("auto", "auto", CPU, is_quantized=False)
    with pytest.raises(ModelUnavailable, match="processor with fma3, f16c"):
        choose_int4("int4", "auto", CPU, is_quantized=False)


def test_threads_keep_to_what_the_container_may_use(monkeypatch):
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(6))
    for limit, cores in ((1e9, 6), (2.5, 2), (0.5, 1)):
        monkeypatch.setattr(parallel, "_cgroup_limit", lambda limit=limit: limit)
        assert parallel.usable_cores() == cores


@pytest.fixture
def own_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("ms_by_threads", "best"),
    [({1: 4, 2: 2.1, 4: 2, 6: 2.05}, 6), ({1: 4, 2: 2, 4: 3, 6: 9}, 2), ({1: 1, 2: 5, 4: 5, 6: 5}, 1)],
    ids=["as many as help", "where more only wait", "where one is best"],
)
def test_tuning_takes_as_many_threads_as_do_the_work_fastest(monkeypatch, own_threads, ms_by_threads, best):
    now = 0.0
    monkeypatch.setattr(parallel, "usable_cores", lambda: 6)

    def work():
        nonlocal now
        now += ms_by_threads[torch.get_num_threads()]

    monkeypatch.setattr("timeit.timeit", lambda work, number: -now + (work(), now)[1])
    parallel.tune_threads(work)
    assert torch.get_num_threads() == best


def test_tuning_leaves_the_last_word_to_the_environment(monkeypatch, own_threads):
    torch.set_num_threads(7)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    parallel.tune_threads(lambda: pytest.fail("nothing is to be measured"))
    assert torch.get_num_threads() == 7
