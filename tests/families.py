"""One small tokenizer of every family, built in memory, and a text in every script."""

import functools
from collections.abc import Callable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from tests.tiny import byte_tokenizer

TEXTS = {
    "Latin": "The “naïve” café’s door: Zwölf Boxkämpfer, cœur, ǅungla — done.\nNext line  two spaces.",
    "Greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "Cyrillic": "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Armenian": "Բել դղյակի ձախ ժամն օֆ ազգությանը",
    "Hebrew": "דג סקרן שט בים מאוכזב, שָׁלוֹם",
    "Arabic": "نص حكيم له سر قاطع وذو شأن عظيم، مُحَمَّد",
    "Devanagari": "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा क्षत्रिय",
    "Bengali": "ব্যাপারীর দুই সন্তান, ক্ষমা",
    "Tamil": "யாமறிந்த மொழிகளிலே தமிழ்மொழி",
    "Thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่ากว่าบรรดาฝูงสัตว์เดรัจฉาน",
    "Lao": "ຂ້ອຍກິນແກ້ວໄດ້ໂດຍທີ່ມັນບໍ່ໄດ້ເຮັດໃຫ້ຂ້ອຍເຈັບ",
    "Khmer": "ខ្ញុំអាចញ៉ាំកញ្ចក់បានដោយគ្មានបញ្ហា",
    "Burmese": "ကျွန်တော် မှန်စားနိုင်တယ်",
    "Tibetan": "ཤེལ་སྒོ་ཟ་ནས་ང་ན་གི་མ་རེད།",
    "Georgian": "მინას ვჭამ და არა მტკივა",
    "Amharic": "ሰማይ አይታረስ ንጉሥ አይከሰስ",
    "Japanese": "いろはにほへと ちりぬるを、カタカナと漢字。\nガ゙",
    "Chinese": "我能吞下玻璃而不傷身體。𠮷野家",
    "Korean": "키스의 고유조건은 입술끼리 만나야 하고 각",
    "Mongolian": "ᠪᠢ ᠰᠢᠯᠢ ᠢᠳᠡᠶᠦ ᠴᠢᠳᠠᠨᠠ",
    "Cherokee": "ᎣᏏᏲ ᏙᎯᏧ",
    "Emoji": "👩‍👩‍👧‍👦 family, 🇩🇪🇯🇵 flags, 👍🏽 skin, ❤️‍🔥, 1️⃣ ok",
    "Mathematics": "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ∑ᵢ x̂ᵢ²",
    "Code": "def f(x):\n    if x > 1:\n\t\treturn f(x - 1) * x  # n!\n\n\nprint(f(5))\r\n",
}

SPECIAL = ["<s>", "</s>", "<|im_end|>"]
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
# The scripts that small vocabularies know; characters of the others are bytes, or unknown.
KNOWN = [TEXTS[name] for name in ("Latin", "Greek", "Cyrillic", "Japanese", "Code")] * 3


def _dress(backend: Tokenizer) -> PreTrainedTokenizerFast:
    backend.add_tokens([AddedToken("<think>", special=False), AddedToken("名前", special=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2, Llama 3, Qwen, SmolLM."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(list(TEXTS.values()) * 3, trainer)
    return _dress(backend)


def tiktoken() -> PreTrainedTokenizerFast:
    """Tokenizers converted from tiktoken: byte-level, split by a regex, merges left aside for whole words."""
    tokenizer = byte_level()
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ?[^\\s]+|\\s+", behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.model.ignore_merges = True
    return tokenizer


def _sentencepiece(backend: Tokenizer, prefix: bool) -> PreTrainedTokenizerFast:
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace] if prefix else [replace])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return _dress(backend)


def _byte_fallback_model() -> models.BPE:
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    special = ["<unk>", *SPECIAL, *BYTE_PIECES]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    backend.train_from_iterator([text.replace(" ", "▁") for text in KNOWN], trainer)
    # Byte pieces are ordinary pieces; training is over, so the model alone is taken.
    return backend.model


def llama() -> PreTrainedTokenizerFast:
    """Llama 2, Mistral: SentencePiece BPE with byte fallback, whose first space is dropped."""
    backend = Tokenizer(_byte_fallback_model())
    backend.add_special_tokens(["<unk>", *SPECIAL])
    return _sentencepiece(backend, prefix=True)


def gemma() -> PreTrainedTokenizerFast:
    """Gemma: SentencePiece BPE with byte fallback, every space kept."""
    backend = Tokenizer(_byte_fallback_model())
    backend.add_special_tokens(["<unk>", *SPECIAL])
    return _sentencepiece(backend, prefix=False)


def unigram() -> PreTrainedTokenizerFast:
    """T5, XLM-R, ALBERT: Unigram with Metaspace."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=800, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXTS.values(), trainer)
    return _dress(backend)


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=800, special_tokens=["[UNK]", *SPECIAL], show_progress=False)
    backend.train_from_iterator(TEXTS.values(), trainer)
    return _dress(backend)


def end_of_word() -> PreTrainedTokenizerFast:
    """GPT-1, XLM: BPE whose last piece of a word carries "</w>"."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", *SPECIAL], end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(TEXTS.values(), trainer)
    return _dress(backend)


def word_level() -> PreTrainedTokenizerFast:
    """Whole words, no decoder: joined with spaces."""
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.train_from_iterator(TEXTS.values(), trainers.WordLevelTrainer(special_tokens=["<unk>", *SPECIAL]))
    return _dress(backend)


class _Slow(PreTrainedTokenizer):
    """A tokenizer in Python over a list of pieces; subclasses say how pieces join."""

    def __init__(self, pieces: list[str], **kwargs) -> None:
        self._pieces = pieces
        self._ids = {piece: i for i, piece in enumerate(pieces)}
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>", **kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def get_vocab(self) -> dict[str, int]:
        return {**self._ids, **self.added_tokens_encoder}

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, self._ids["<unk>"])

    def _convert_id_to_token(self, index: int) -> str:
        return self._pieces[index]


class SlowSubword(_Slow):
    """CTRL, PhoBERT, BERTweet: "@@" at the end of a piece joins it to the next, whatever comes after."""

    def _tokenize(self, text: str) -> list[str]:
        pieces = []
        for word in text.split():
            cuts = [word[i : i + 2] for i in range(0, len(word), 2)]
            pieces += [cut + "@@" for cut in cuts[:-1]] + cuts[-1:]
        return pieces

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return " ".join(tokens).replace("@@ ", "").strip()


class SlowSentencePiece(_Slow):
    """transformers' SentencePieceBackend: pieces joined, spaces at both ends stripped."""

    def _tokenize(self, text: str) -> list[str]:
        return list("▁" + text.replace(" ", "▁"))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens).replace("▁", " ").strip()


class SlowTiktoken(_Slow):
    """Qwen 1, Kimi: bytes ranked in Python, decoded with malformed ones replaced."""

    def _tokenize(self, text: str) -> list[str]:
        raw = text.encode()
        return [raw[i : i + 1].decode("latin-1") for i in range(len(raw))]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        special = set(self.all_special_tokens) | set(self.added_tokens_encoder)
        raw = b"".join(t.encode() if t in special else t.encode("latin-1") for t in tokens)
        return raw.decode("utf-8", errors="replace")


def slow_subword() -> PreTrainedTokenizer:
    words = [word for text in TEXTS.values() for word in text.split()]
    cuts = {word[i : i + 2] for word in words for i in range(0, len(word), 2)}
    return SlowSubword(["<s>", "</s>", "<unk>", *sorted(cuts | {cut + "@@" for cut in cuts})])


def slow_sentencepiece() -> PreTrainedTokenizer:
    characters = {c for text in TEXTS.values() for c in text.replace(" ", "▁")}
    return SlowSentencePiece(["<s>", "</s>", "<unk>", *sorted(characters)])


def slow_tiktoken() -> PreTrainedTokenizer:
    pairs = [a + b for a in "\xe3\x81\xf0\x9f é" for b in "\x81\x82\x9f aé"]
    return SlowTiktoken(["<s>", "</s>", "<unk>", *(chr(byte) for byte in range(256)), *pairs])


FAMILIES: dict[str, Callable[[], PreTrainedTokenizerFast | PreTrainedTokenizer]] = {
    "bytes": byte_tokenizer,
    "byte-level BPE": byte_level,
    "tiktoken": tiktoken,
    "SentencePiece BPE, byte fallback, leading space dropped": llama,
    "SentencePiece BPE, byte fallback": gemma,
    "Unigram": unigram,
    "WordPiece": wordpiece,
    "BPE with end of word": end_of_word,
    "words": word_level,
    "slow, @@": slow_subword,
    "slow SentencePiece": slow_sentencepiece,
    "slow tiktoken": slow_tiktoken,
    "slow ByT5": ByT5Tokenizer,
}


@functools.cache
def family(name: str) -> PreTrainedTokenizerFast | PreTrainedTokenizer:
    """Give the tokenizer of a family; built once."""
    return FAMILIES[name]()
