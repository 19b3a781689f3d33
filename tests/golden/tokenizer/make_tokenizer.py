#!/usr/bin/env python3
"""Writes the golden files of the tokenizers from independent implementations.

    pip install gguf numpy tokenizers sentencepiece llama-cpp-python && python3 make_tokenizer.py SmolLM2-135M-Instruct.Q4_1.gguf

smollm2.txt     texts and their ids in the sample model's vocabulary; llama.cpp and Hugging Face's tokenizers agree on every one of them
bpe.gguf, .txt  a small byte-level BPE vocabulary trained here by tokenizers, and its ids; llama.cpp agrees
spm.gguf, .txt  a small SPM vocabulary trained here by sentencepiece, and its ids; llama.cpp agrees
splits.txt      where each pre-tokenizer cuts: the texts of smollm2.txt, then hashes over a million characters of mixed scripts (see chunk())

A line of ids: kind, text in hex ("-": empty), ids. kind: "s" special tokens are parsed, "p" they are text.
"""
import io
import json
import os
import random
import sys
import tempfile

import gguf
import sentencepiece
from llama_cpp import Llama
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = os.path.dirname(os.path.abspath(__file__))
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(*patterns):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(p), "isolated") for p in patterns])


TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
          r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")


SPLITS = {
    "default": split(r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": split(GPT2),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Split(Regex(GPT2), "isolated")]),
    "qwen2": split(CL100K % r"\p{N}"),
    "llama-bpe": split(CL100K % r"\p{N}{1,3}"),
    "tekken": split(TEKKEN),
}

PLAIN = """
Hello|hello world| hello|Hello, World!|The quick brown fox jumps over the lazy dog.|I'm|I'M|you're|YOU'RE|we've|he'll|she'd|it's|don't|'s|'S|' s|''s|'
can't won't shouldn't've|y'all'd've|o'clock|rock 'n' roll|it’s|don’t|'tis 'twas|'re're're|'ſ|'ſe|x'ſ|'Ll|'lL|'vE|'Re|ain'tain't
1|12|123|1234|12345678901234567890|3.14159|1,000,000|-42|+7|1e10|0x1F600|2024-11-25T20:58:00Z|192.168.0.1|1st 2nd 3rd|a1b2c3|1a2b3c|٣٤٥|१२३|①②③|½¾|²³|Ⅷ|㊿|一二三|𝟘𝟙𝟚|๑๒๓
😀|🙂🙃|👍🏽|👩‍👩‍👧‍👦|🏳️‍🌈|🇩🇪🇫🇷|❤️|e‍e|a​b|☃|♥♦♣♠|🫠|🧑‍🚀 to the 🌕
你好|你好，世界！|中文 字符|人工智能正在改变世界。|我有3个苹果|日本語テキスト|カタカナ|ひらがな|東京都2024年|한국어|안녕하세요 세계|한글 자모 ㄱㄴㄷ
العربية|مرحبا بالعالم|السَّلامُ عَلَيْكُمْ|עברית|שָׁלוֹם|فارسی ۱۲۳|اردو|ไทย|สวัสดีชาวโลก|ภาษาไทยไม่มีเว้นวรรค|हिन्दी|नमस्ते दुनिया|বাংলা|தமிழ்|ქართული|Հայերեն|ខ្មែរ|မြန်မာ|አማርኛ
Привет, мир!|русский язык|ЁЖИК|Ελληνικά|Ωραίο πρωί|ß|straße|STRASSE|İstanbul|ıi|naïve café|naïve café|Ǆ ǅ ǆ|ﬁ ﬂ|Å Å Å|Việt Nam|Tiếng Việt|zażółć gęślą jaźń|Þórr|Øre
for (int i = 0; i < n; i++) { sum += a[i]; }|def f(x):|return x**2 + 1|if x != None and y == "z":|#include <stdio.h>|printf("%d\\n", x);|std::vector<std::map<int, std::string>> v;|a->b.c[d](e)|!@#$%^&*()_+-=[]{};':",.<>/?\\`~|<!-- html --> <div class="x">y</div>|{"key": [1, 2.5, null, true]}|SELECT * FROM t WHERE a='b';|$HOME/.config|C:\\Windows\\System32|https://example.com/a?b=c&d=e#f|user@example.com|snake_case camelCase PascalCase SCREAMING_CASE kebab-case|x=>y|==!=<=>=|...|…|--|—|–|a—b|(a)|[b]|<c>|"d"|'e'|«f»|“g”|„h“|//|/* c */|\\alpha^{2}_{i}|$x^2$|a/b/c|1+1=2|~~~~|^^|||&&
"""

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>user", "<|im_start|><|im_end|>", "x<|im_end|>y", "<|im_end|> ",
           "<|im_en|im_end|>", "<|im_end|<|im_end|>", "<<|im_end|>>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>", "<gh_stars>",
           "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>",
           "<jupyter_script>", "<empty_output>", "<empty_output", "<|IM_START|>", "< |im_start|>", "<s>", "</s>", "<unk>", "<pad>", "[INST]",
           "<0x0A>", "|", "||", "a|b"]

SPACED = ["", " ", "  ", "   ", " " * 4, " " * 7, " " * 16, " " * 33, " " * 300, "\t", "\t\t", "\t\t\t\t\t", "\n", "\n\n", "\n\n\n", "\n" * 20, "\r", "\r\n", "\r\n\r\n", "\n\r",
          " \n", "\n ", " \n ", "  \n  ", "\t\n\t", "\n\t\tx", "a b", "a  b", "a   b", "a\tb", "a\t b", "a \tb", "a\nb", "a\n\nb", "a \nb", "a\n b", "a  \n  b", " a", "  a", "a ",
          "a  ", " a ", "\ta", "a\t", "\na", "a\n", "a\r\nb", "a\r\n  b\r\n", "if x:\n    return y\n\n\nelse:\n\tpass\n", "{\n  \"a\": 1,\n\t\"b\":  2\n}", " 1", "  1", "1 ", "1  2", "1\n2",
          " !", "  !", "! ", "!\n", "!\n\n", "!  \n", "! !", "?!\r\n\r\nx", " 'x", "'s 't", " 's", "  's", "a's b't", "\u00a0", "\u00a0\u00a0", "a\u00a0b", " \u00a0 ", "\u00a0a", "\u00a0!", "\u2003a",
          "\u2003\u2003a", "\u3000あ", "\u3000\u3000", "\u2028", "a\u2028b", "\u2029\u2029", "\u202f1", "\u205f", "\u1680x", "\x0b", "\x0c", "a\x0bb", "\x0c\x0c x", "\x85", "a\x85b", "\x85\x85", " \x85 ", "\u180e", "a\u180eb",
          " \u180e ", "\u180e\u180e!", "\u200b", " \u200b", "a\u200bb", "\u200d", "\ufeff", "\ufeffHello", "\u2060", "\x00", "a\x00b", "\x00\x00\x00", "\x01\x02\x03", "\x07\x08", "\x1b[31mred\x1b[0m", "\x7f", "\x1c\x1d\x1e\x1f",
          "\x1ca", " \x1f ", "\u0301", "e\u0301", "\u0301\u0301\u0301", "a\u0300\u0316\u0489b", "Z\u0335\u0321\u0330a\u0337l\u0338g\u0334o", "\ufffd", "\ufffdx\ufffd", "\uffff", "\ue000\uf8ff", "\U0010ffff", "\U000e0001\U000e0020",
          "\u202e\u202dabc", "a" * 100, "a" * 1000, "ab" * 300, "abc" * 200, "A" * 257, "aA" * 50, "1" * 100, "12" * 100, "!" * 100, "=" * 80, "-" * 80, "#" * 33, "_" * 64, "." * 50, "é" * 50, "日" * 100, "😀" * 30,
          "\u0e01" * 60, "x\n" * 50, "\t" * 50, " \t" * 25, "\r\n" * 25, "z" * 4096, "the " * 100, "supercalifragilisticexpialidocious" * 5, "Donaudampfschifffahrtsgesellschaftskapitän",
          "Llanfairpwllgwyngyllgogerychwyrndrobwllllantysiliogogogoch", "pneumonoultramicroscopicsilicovolcanoconiosis", "0123456789abcdef" * 8, "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9", "d41d8cd98f00b204e9800998ecf8427e",
          "日本語とEnglishの混在text123です。", "mixed العربية and עברית and 中文", "price: $1,234.56 (≈ €1.100,00)", "x₁² + y₂³ ≤ ∞", "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋", "α ∧ ¬β → γ", "ﷺ", "℃ ™ © ®", "㍿㌔", "ｆｕｌｌｗｉｄｔｈ　ＡＢＣ１２３", "𝕳𝖊𝖑𝖑𝖔 𝒲ℴ𝓇𝓁𝒹", "𐍈𐌰𐌹", "𒀀𒁀",
          "ā ē ī ō ū", "ñ n\u0303", "\u1100\u1161\u11a8 각", "क्षि", "ྒྷ", "ﾊﾝｶｸ", "\u0600\u06dd", "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", "1️⃣2️⃣", "👨🏿‍💻",
          "<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n<|im_start|>user\nWhat's 2+2?<|im_end|>\n<|im_start|>assistant\n", "  <|im_end|>  ", "<|im_end|>\n\n<|im_end|>", "\u00e9<|im_end|>\u00e9", "1<|im_end|>2"]


def texts():
    rng = random.Random(2)
    found = [text for line in PLAIN.strip("\n").split("\n") for text in line.split("|")] + SPECIAL + SPACED
    pool = ["a", "B", "the", " ", "  ", "\n", "\t", "\r", "'s", "'", "1", "42", ".", ",", "!?", "é", "ß", "中", "文", "あ", "ع", "ไ", "ก", "्", "न", "한", "😀", "\u200d", "\u0301", "\u00a0", "\u3000", "½", "Ⅳ", "_", "<|", "|>", "$", "–", "\u180e", "\x85"]
    for _ in range(150):
        found.append("".join(rng.choice(pool) for _ in range(rng.randint(3, 24))))
    return list(dict.fromkeys(found))


def hexed(text):
    return text.encode().hex() or "-"


def line(kind, text, ids):
    return " ".join([kind, hexed(text), *map(str, ids)])


def write(name, lines):
    with io.open(os.path.join(HERE, name), "w", newline="\n") as out:
        out.write("\n".join(lines) + "\n")


def hugging_face(fields, parse_special):
    tokens, merges = fields["tokenizer.ggml.tokens"].contents(), fields["tokenizer.ggml.merges"].contents()
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[tuple(m.split(" ")) for m in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if parse_special:
        types = fields["tokenizer.ggml.token_type"].contents()
        tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, kind in zip(tokens, types) if kind == 3])
    return tokenizer


def sample_model(path, cases):
    known = {}
    fields = gguf.GGUFReader(path).fields
    llama = Llama(path, vocab_only=True, verbose=False)
    lines, differ = [], 0
    for kind in "sp":
        peer = hugging_face(fields, kind == "s")
        for text in cases:
            ids = peer.encode(text, add_special_tokens=False).ids
            if llama.tokenize(text.encode(), add_bos=False, special=kind == "s") != ids:
                differ += 1
                print("llama.cpp and tokenizers differ on", kind, repr(text), file=sys.stderr)
                continue
            if kind == "s" or ids != known.get(text):
                lines.append(line(kind, text, ids))
            if kind == "s":
                known[text] = ids
    write("smollm2.txt", lines)
    print(f"smollm2.txt: {len(lines)} lines, {differ} left out", file=sys.stderr)


CORPUS = """Compression removes what attention does not use. A cache of keys and values grows with every token, and every head of every layer keeps its own.
The scheduler hands out blocks; when blocks run short, the least useful tokens are dropped and whole blocks come free. Don't panic: it's only memory.
for (size_t i = 0; i < count; i++) total += lengths[i]; /* 64-bit */ if (!ok) return STATUS_INVALID;
Größe, Maß und Zahl: 12 Äpfel, 345 Birnen. Où est le garçon? Ça va bien. El niño comió piñas. Привет, мир! Γειά σου. 你好世界。日本語の文章です。안녕하세요. مرحبا. สวัสดี. 😀🎉
"""


def small_vocabulary(name, model, tokens, types, scores=None, merges=None, pre=None, bos=None, eos=None, unk=None):
    writer = gguf.GGUFWriter(os.path.join(HERE, name), "llama")
    writer.add_tokenizer_model(model)
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if scores:
        writer.add_token_scores(scores)
    if merges:
        writer.add_token_merges(merges)
    if bos is not None:
        writer.add_bos_token_id(bos)
    if eos is not None:
        writer.add_eos_token_id(eos)
    if unk is not None:
        writer.add_unk_token_id(unk)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def small_bpe(cases):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([SPLITS["qwen2"], pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(CORPUS.split("\n") * 3, trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"], show_progress=False))
    data = json.loads(tokenizer.to_str())["model"]
    tokens = [t for t, _ in sorted(data["vocab"].items(), key=lambda item: item[1])]
    small_vocabulary("bpe.gguf", "gpt2", tokens, [3 if t == "<|end|>" else 1 for t in tokens], merges=[" ".join(m) for m in data["merges"]], pre="qwen2", eos=0)
    llama = Llama(os.path.join(HERE, "bpe.gguf"), vocab_only=True, verbose=False)
    lines = []
    for text in cases:
        ids = tokenizer.encode(text).ids
        if llama.tokenize(text.encode(), add_bos=False, special=True) != ids:
            print("bpe.gguf: llama.cpp and tokenizers differ on", repr(text), file=sys.stderr)
            continue
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        lines.append(line("s", text, ids))
    write("bpe.txt", lines)


def small_spm(cases):
    with tempfile.TemporaryDirectory() as folder:
        prefix = os.path.join(folder, "spm")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS.split("\n") * 3), model_prefix=prefix, vocab_size=640, model_type="bpe", byte_fallback=True, character_coverage=0.98,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True, allow_whitespace_only_pieces=True, split_digits=True,
            user_defined_symbols=["<|turn|>"], minloglevel=2, num_threads=1)
        peer = sentencepiece.SentencePieceProcessor(model_file=prefix + ".model")
    count = peer.get_piece_size()
    kinds = [2 if peer.is_unknown(i) else 3 if peer.is_control(i) else 6 if peer.is_byte(i) else 4 if peer.id_to_piece(i) == "<|turn|>" else 1 for i in range(count)]
    small_vocabulary("spm.gguf", "llama", [peer.id_to_piece(i) for i in range(count)], kinds, scores=[peer.get_score(i) for i in range(count)], bos=1, eos=2, unk=0)
    llama = Llama(os.path.join(HERE, "spm.gguf"), vocab_only=True, verbose=False)
    lines, differ = [], []
    for text in cases:
        ids = llama.tokenize(text.encode(), add_bos=False, special=False)
        if peer.encode(text) == ids:
            lines.append(line("p", text, ids))
        else:
            differ.append(text)
    print(f"spm.txt: {len(lines)} lines; llama.cpp and sentencepiece differ on {len(differ)}: {differ}", file=sys.stderr)
    write("spm.txt", lines)


class Generator:
    """base/random.h"""

    def __init__(self, state):
        self.state = state

    def next(self):
        mask = (1 << 64) - 1
        self.state = x = self.state + 0x9E3779B97F4A7C15 & mask
        x = x + 0x9E3779B97F4A7C15 & mask
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return x ^ x >> 31


# First and last code point of runs without unassigned ones, so that no version of Unicode matters. The C test has the same table.
RUNS = [(0x20, 0x20), (0x20, 0x20), (0x61, 0x7A), (0x61, 0x7A), (0x41, 0x5A), (0x30, 0x39), (0x21, 0x2F), (0x3A, 0x40), (0x5B, 0x60), (0x7B, 0x7E), (0x09, 0x0D), (0x27, 0x27),
        (0x72, 0x74), (0x0, 0x1F), (0x7F, 0xA0), (0xA1, 0xFF), (0x100, 0x17F), (0x391, 0x3A1), (0x3B1, 0x3C9), (0x410, 0x44F), (0x5D0, 0x5EA), (0x621, 0x64A), (0x64B, 0x669),
        (0x904, 0x939), (0x93E, 0x94D), (0x966, 0x96F), (0xE01, 0xE3A), (0xE40, 0xE5B), (0x10D0, 0x10FA), (0x1100, 0x1112), (0x180E, 0x180E), (0x2000, 0x200F), (0x2010, 0x2029),
        (0x202F, 0x205F), (0x2070, 0x2071), (0x2074, 0x208E), (0x2150, 0x2188), (0x2190, 0x21FF), (0x2460, 0x24FF), (0x3000, 0x303F), (0x3041, 0x3096), (0x30A1, 0x30FA),
        (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0xE000, 0xE0FF), (0xFF01, 0xFF5E), (0x10330, 0x1034A), (0x1D7CE, 0x1D7FF), (0x1F600, 0x1F64F), (0x0300, 0x036F), (0xFE00, 0xFE0F), (0x017F, 0x017F)]
CHUNKS, CHUNK_CHARACTERS, CHUNKS_A_HASH = 1000, 1000, 10


def chunk(index):
    generator = Generator(index)
    characters = []
    while len(characters) < CHUNK_CHARACTERS:
        bits = generator.next()
        first, last = RUNS[(bits >> 32) % len(RUNS)]
        for _ in range(1 + (bits >> 16 & 3)):  # runs of one kind are what patterns are about
            characters.append(chr(first + (bits & 0xFFFF) % (last - first + 1)))
            bits = bits * 5 & (1 << 64) - 1
    return "".join(characters[:CHUNK_CHARACTERS])


def cuts(splitter, text):
    widths = [0]
    for character in text:
        widths.append(widths[-1] + len(character.encode()))
    return [widths[end] for _, (_, end) in splitter.pre_tokenize_str(text)] if text else []


def splits(cases):
    lines = []
    chunks = [chunk(i) for i in range(CHUNKS)]
    for name, splitter in SPLITS.items():
        for text in cases:
            lines.append(" ".join(["cut", name, hexed(text), *map(str, cuts(splitter, text))]))
        for start in range(0, CHUNKS, CHUNKS_A_HASH):
            value = 0xCBF29CE484222325  # FNV-1a over the ends, 32 bits each
            for text in chunks[start:start + CHUNKS_A_HASH]:
                for end in cuts(splitter, text):
                    for byte in end.to_bytes(4, "little"):
                        value = (value ^ byte) * 0x100000001B3 & (1 << 64) - 1
            lines.append(f"hash {name} {start} {value:016x}")
    write("splits.txt", lines)


def main():
    cases = texts()
    print(len(cases), "texts", file=sys.stderr)
    sample_model(sys.argv[1], cases)
    small_bpe(cases)
    small_spm(cases)
    splits([t for t in cases if len(t) < 200])


main()
