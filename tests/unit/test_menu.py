"""Several models behind one engine: which are loaded, which leave, and that nobody's stream is cut for another's."""

import dataclasses
import gc
import threading
import weakref

import pytest

from streaming.engine import menu_model
from streaming.engine.base import GenerationRequest
from streaming.engine.local import LocalEngine
from streaming.engine.menu import ModelMenu, load_menu
from streaming.errors import EngineClosed, ModelDamaged, ModelNotFound, ModelTooLarge
from streaming.models.loading import load_model
from streaming.settings import Settings
from tests.tiny import Parrot, byte_tokenizer, loaded, tiny_llama

WAIT_S = 30
N_BYTES = 4 * sum(p.numel() for p in tiny_llama().parameters())
PLENTY = 10**12


def request(model: str = "", text: str = "hello") -> GenerationRequest:
    return GenerationRequest(prompt=text, max_new_tokens=4, temperature=0, model=model)


def states(menu: ModelMenu) -> dict[str, str]:
    return {model.model_id: model.status().state for model in menu.models}


@pytest.fixture
def folders(tmp_path):
    """Three models that write different things."""
    names = []
    for seed in range(3):
        names.append(str(tmp_path / f"tiny-{seed}"))
        tiny_llama(seed).save_pretrained(names[-1])
        byte_tokenizer().save_pretrained(names[-1])
    return names


@pytest.fixture
def menu_of(tmp_path):
    """Make menus of real models in fp32, as the app does."""
    menus = []

    def make(*models: str, **options) -> ModelMenu:
        menus.append(load_menu(Settings(models=models, device="cpu", dtype="float32", cache_dir=tmp_path, **options)))
        return menus[-1]

    yield make
    for menu in menus:
        menu.close()


class Scripted:
    """A menu of scripted models that need `n_bytes` each, and wait for `go` before their second token."""

    def __init__(self, *names: str, n_free: int = PLENTY, **options) -> None:
        self.n_free = n_free
        self.n_bytes = dict.fromkeys(names, 100)
        self.go, self.said = threading.Event(), threading.Event()
        self.loads: list[str] = []
        self.engines: list[LocalEngine] = []
        self.menu = ModelMenu(self.make, names, **options)

    def make(self, name, make_room) -> LocalEngine:
        def load(progress):
            self.loads.append(name)
            make_room(self.n_bytes.get(name, 100), self.n_free)
            return dataclasses.replace(loaded(Parrot([97] * 3, {1: self.wait})), model_id=name)

        self.engines.append(LocalEngine(load, name))
        return self.engines[-1]

    def wait(self) -> None:
        self.said.set()
        assert self.go.wait(WAIT_S)

    def use(self, *names: str) -> None:
        self.go.set()
        for name in names:
            self.menu.submit(request(name)).result(WAIT_S)


@pytest.fixture
def scripted():
    made = []

    def make(*names: str, **options) -> Scripted:
        made.append(Scripted(*names, **options))
        return made[-1]

    yield make
    for one in made:
        one.go.set()
        one.menu.close()


class TestChoosing:
    def test_each_request_is_served_by_the_model_that_it_names(self, menu_of, folders):
        menu = menu_of(*folders)
        said = [menu.submit(request(name)).result(WAIT_S).token_ids for name in folders]
        assert len({tuple(ids) for ids in said}) == 3
        assert menu.submit(request()).result(WAIT_S).token_ids == said[0]
        alone = LocalEngine(lambda progress: load_model(folders[1], device="cpu", dtype="float32"))
        assert alone.submit(request()).result(WAIT_S).token_ids == said[1]
        alone.close()

    def test_nothing_is_loaded_before_it_is_asked_for(self, scripted):
        one = scripted("a", "b")
        assert states(one.menu) == {"a": "unloaded", "b": "unloaded"}
        one.menu.start()
        assert one.menu.wait_ready(WAIT_S)
        assert states(one.menu) == {"a": "ready", "b": "unloaded"}
        assert one.menu.find("b").wait_ready(WAIT_S)
        assert one.loads == ["a", "b"]

    def test_as_an_engine_it_is_its_first_model_and_counts_all(self, scripted):
        one = scripted("a", "b")
        one.menu.start()
        one.menu.wait_ready(WAIT_S)
        assert one.menu.model_id == "a"
        assert one.menu.tokenizer is one.menu.find("a").tokenizer
        run = one.menu.submit(request("b"))
        assert one.said.wait(WAIT_S)
        status = one.menu.status()
        assert (status.model_id, status.state, status.n_active) == ("a", "ready", 1)
        one.go.set()
        run.result(WAIT_S)

    def test_only_listed_models_are_served_unless_the_menu_is_open(self, scripted):
        closed = scripted("a").menu
        with pytest.raises(ModelNotFound, match="not one of the models"):
            closed.submit(request("b"))
        one = scripted("a", is_open=True)
        one.use("b")
        assert list(states(one.menu)) == ["a", "b"]
        with pytest.raises(ModelNotFound, match="not one of the models"):
            one.menu.find("c", may_add=False)
        assert one.menu.find("b", may_add=False).name == "b"

    def test_what_is_shared_is_not_open(self, menu_of):
        assert menu_of("a").is_open
        assert not menu_of("a", share=True).is_open
        assert not menu_of("a", host="0.0.0.0").is_open
        assert not menu_of("a", auth=(("ann", "pw"),)).is_open

    def test_a_menu_of_one_engine_is_that_engine(self):
        engine = LocalEngine(lambda progress: loaded(tiny_llama()), "only")
        menu = ModelMenu.of(engine)
        assert menu.first.status() == engine.status()
        assert menu.submit(request()).result(WAIT_S).finish.reason == "length"
        assert not menu.is_open
        engine.close()


class TestRoom:
    def test_the_model_used_longest_ago_leaves_and_comes_back_when_asked(self, scripted):
        one = scripted("a", "b", "c", max_bytes=250)
        one.use("a", "b", "a", "c")
        assert states(one.menu) == {"a": "ready", "b": "unloaded", "c": "ready"}
        one.use("b")
        assert states(one.menu) == {"a": "unloaded", "b": "ready", "c": "ready"}
        assert one.loads == ["a", "b", "c", "b"]

    def test_without_a_budget_models_leave_only_where_memory_is_short(self, scripted):
        one = scripted("a", "b", "c")
        one.use("a", "b")
        one.n_free = 30
        one.use("c")
        assert states(one.menu) == {"a": "unloaded", "b": "ready", "c": "ready"}

    def test_a_model_that_someone_streams_from_stays(self, scripted):
        one = scripted("a", "b", max_bytes=150)
        streaming = one.menu.submit(request("a"))
        assert one.said.wait(WAIT_S)
        with pytest.raises(ModelTooLarge, match="nobody streams"):
            one.menu.find("b").wait_ready(WAIT_S)
        assert states(one.menu) == {"a": "ready", "b": "failed"}
        one.go.set()
        assert streaming.result(WAIT_S).token_ids == [97, 97, 97, 258]
        one.menu.find("b").load()
        assert one.menu.find("b").wait_ready(WAIT_S)
        assert states(one.menu) == {"a": "unloaded", "b": "ready"}

    def test_a_model_too_large_for_the_budget_says_so_and_nobody_leaves(self, scripted):
        one = scripted("a", "b", max_bytes=150)
        one.n_bytes["b"] = 10**10
        one.use("a")
        with pytest.raises(ModelTooLarge, match=r"^b needs 10\.00 GB but --model-memory allows 0\.00 GB"):
            one.menu.find("b").wait_ready(WAIT_S)
        assert states(one.menu) == {"a": "ready", "b": "failed"}

    def test_what_a_model_said_of_itself_stays_known_while_it_is_unloaded(self, scripted):
        one = scripted("a", "b", max_bytes=150)
        one.use("a")
        known = one.menu.find("a").tokenizer, one.menu.find("a").defaults
        one.use("b")
        assert (one.menu.find("a").tokenizer, one.menu.find("a").defaults) == known
        assert states(one.menu) == {"a": "unloaded", "b": "ready"}

    def test_the_budget_counts_what_the_weights_take_and_they_are_freed(self, menu_of, folders):
        menu = menu_of(*folders, model_memory=1)  # 1 MB is room for many of them, so the budget is set by hand
        menu._max_bytes = 2 * N_BYTES + 100
        for name in folders[:2]:
            menu.submit(request(name)).result(WAIT_S)
        assert [model.n_bytes for model in menu.models] == [N_BYTES, N_BYTES, 0]
        weights = weakref.ref(menu.find(folders[0])._engine._engine._loaded.model)
        run = menu.submit(request(folders[2]))
        run.result(WAIT_S)
        assert list(states(menu).values()) == ["unloaded", "ready", "ready"]
        gc.collect()
        assert weights() is None

    @pytest.mark.parametrize("engine", ["local", "batched"])
    def test_a_switch_frees_the_model_before_and_all_that_was_kept_for_it(self, menu_of, folders, engine):
        menu = menu_of(*folders[:2], model_memory=1, engine=engine)
        menu._max_bytes = N_BYTES + 100
        menu.submit(request(folders[0])).result(WAIT_S)
        assert menu.status().n_cache_bytes > 0
        before = menu.find(folders[0])._engine._engine
        gone = [weakref.ref(one) for one in (before, before._loaded.model, before._reading.prefixes)]
        del before
        # Nothing waits for the garbage collector: memory is counted right after, for the model that needs it.
        gc.collect()
        gc.disable()
        try:
            assert menu.find(folders[1]).wait_ready(WAIT_S)
            assert [one() for one in gone] == [None] * 3
        finally:
            gc.enable()
        assert [model.status().n_cache_bytes for model in menu.models] == [0, 0]
        assert list(states(menu).values()) == ["unloaded", "ready"]

    def test_people_who_switch_at_random_all_get_their_replies(self, scripted):
        names = ["a", "b", "c", "d"]
        one = scripted(*names, n_free=PLENTY, max_bytes=350)
        one.go.set()
        failures: list[BaseException] = []

        def person(number: int) -> None:
            try:
                for i in range(12):
                    name = names[(number * 7 + i * (number + 1)) % 4]
                    for _ in range(200):
                        try:
                            run = one.menu.submit(request(name))
                            break
                        except ModelTooLarge:  # everyone else was streaming just then
                            one.menu.find(name).load()
                    assert run.result(WAIT_S).finish.reason == "stop", run.finish
            except BaseException as error:
                failures.append(error)

        people = [threading.Thread(target=person, args=(n,)) for n in range(3)]
        for thread in people:
            thread.start()
        for thread in people:
            thread.join(WAIT_S)
        assert failures == []
        assert sum(model.n_bytes for model in one.menu.models if model.is_loaded) <= 350


class TestFailures:
    def test_a_model_that_cannot_be_loaded_says_why_and_the_others_go_on(self, menu_of, folders, tmp_path):
        (tmp_path / "tiny-1" / "config.json").unlink()
        menu = menu_of(*folders)
        menu.submit(request()).result(WAIT_S)
        with pytest.raises(ModelDamaged, match=r"there is no config\.json"):
            menu.submit(request(folders[1]))
        assert list(states(menu).values()) == ["ready", "failed", "unloaded"]
        assert menu.submit(request()).result(WAIT_S).finish.reason == "length"
        tiny_llama(1).save_pretrained(folders[1])
        menu.find(folders[1]).load()
        assert menu.find(folders[1]).wait_ready(WAIT_S)

    @pytest.fixture
    def refused(self, scripted):
        """Give a menu whose second model was refused while someone streamed from the first, who has ended since."""
        one = scripted("a", "b", max_bytes=150)
        streaming = one.menu.submit(request("a"))
        assert one.said.wait(WAIT_S)
        with pytest.raises(ModelTooLarge, match="nobody streams"):
            one.menu.submit(request("b"))
        one.go.set()
        streaming.result(WAIT_S)
        return one

    def test_a_while_after_a_failure_a_request_tries_again(self, refused, monkeypatch):
        monkeypatch.setattr(menu_model, "RETRY_S", 0.0)
        refused.use("b")
        assert refused.loads == ["a", "b", "b"]

    def test_until_then_requests_are_told_the_same_and_whoever_chooses_it_does_not_wait(self, refused):
        for _ in range(3):
            with pytest.raises(ModelTooLarge, match="nobody streams"):
                refused.menu.submit(request("b"))
        assert refused.loads == ["a", "b"]
        refused.menu.find("b").load()
        refused.use("b")
        assert refused.loads == ["a", "b", "b"]

    def test_an_engine_that_failed_is_closed_when_another_takes_its_place(self, refused):
        refused.menu.find("b").load()
        refused.use("b")
        assert [engine.status().state for engine in refused.engines] == ["closed", "closed", "ready"]

    def test_a_name_that_was_typed_and_leads_nowhere_does_not_stay_on_the_menu(self, menu_of, folders):
        menu = menu_of(folders[0])
        model = menu.find("./nowhere")
        with pytest.raises(ModelNotFound, match=r"nothing at \./nowhere"):
            model.wait_ready(WAIT_S)
        failed = model._engine
        menu.drop(model)
        menu.drop(menu.first)
        assert list(states(menu)) == [folders[0]]
        assert failed.status().state == "closed"

    def test_after_the_end_nothing_loads(self, scripted):
        one = scripted("a", "b")
        one.use("a")
        one.menu.close()
        with pytest.raises(EngineClosed):
            one.menu.submit(request("b"))
        assert one.loads == ["a"]
