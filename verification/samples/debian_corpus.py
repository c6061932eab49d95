"""Build the text corpus that `train_debian_moe.py` trains on, out of Debian packages.

    python verification/samples/debian_corpus.py --packages DEBS --out FOLDER

DEBS is a folder of .deb files, one for each name in PACKAGES, as `apt-get download` leaves them
(Debian 12). FOLDER gets `tokenizer.json` (a byte-level BPE), `tokens.npz` (the training documents
as uint16 token ids, packed with LZMA), `prompts.jsonl` (held-out documents, for
`moesim trace capture`) and `corpus.json` (packages, versions, sizes). Nothing is fetched. The texts
stay where they are: they have their packages' licences, and only token and routing ids derived
from them are published.

A document is one file of a package, or a piece of PIECE_CHARS of a longer one. A file is held out,
whole, by a hash of its path: HELD_OUT of 100 (a domain of fewer than FEW_FILES files: by piece).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html.parser
import json
import lzma
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

PACKAGES: dict[str, tuple[tuple[str, str], ...]] = {
    "man": (("manpages", "**/man*/*.gz"), ("manpages-dev", "**/man*/*.gz")),
    "help": (("libreoffice-help-en-us", "**/*.html"),),
    "de": (("manpages-de", "**/man*/*.gz"), ("libreoffice-help-de", "**/*.html")),
    "es": (("manpages-es", "**/man*/*.gz"), ("libreoffice-help-es", "**/*.html")),
    "fr": (("manpages-fr", "**/man*/*.gz"), ("libreoffice-help-fr", "**/*.html")),
    "ru": (("manpages-ru", "**/man*/*.gz"), ("libreoffice-help-ru", "**/*.html")),
    "ja": (("manpages-ja", "**/man*/*.gz"), ("libreoffice-help-ja", "**/*.html")),
    "zh": (("manpages-zh", "**/man*/*.gz"), ("libreoffice-help-zh-cn", "**/*.html")),
    "prose": (
        ("anarchism", "**/*.html"),
        ("debian-faq", "**/*.html"),
        ("fortunes", "**/fortunes/*"),
    ),
    "dict": (("wordnet-base", "**/data.*"), ("dict-gcide", "**/*.dict.dz")),
    "c": (("gnulib", "**/*.[ch]"),),
    "go": (("golang-1.19-src", "**/*.go"),),
    "python": (
        ("libpython3.11-stdlib", "**/*.py"),
        ("python3-sympy", "**/*.py"),
        ("python3-networkx", "**/*.py"),
    ),
    "perl": (("perl-doc", "**/*.pod"), ("perl-modules-5.36", "**/*.pm")),
    "sql": (("postgresql-doc-15", "**/*.html"), ("sqlite3-doc", "**/*.html")),
}
"""Domain: (package, files of it)."""

PIECE_CHARS = 16_000
MIN_CHARS = 600
HELD_OUT = 6
FEW_FILES = 9
END = "<|end|>"
_ROFF = re.compile(r"\\f[A-Z]|\\f\(..|\\[&/|^,c]|\\s[-+]?\d")


class _Text(html.parser.HTMLParser):
    """The text of an HTML page, without scripts, styles and navigation."""

    skipped = frozenset({"script", "style", "head", "nav", "header", "footer", "aside"})
    blocks = frozenset({"p", "div", "li", "tr", "br", "h1", "h2", "h3", "h4", "dt", "dd", "pre"})

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.depth += tag in self.skipped
        if tag in self.blocks:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.depth = max(0, self.depth - (tag in self.skipped))

    def handle_data(self, data: str) -> None:
        if not self.depth:
            self.parts.append(data)


def clean(path: Path, raw: bytes) -> str:
    """The plain text of a file: HTML without tags, manual pages without most of their markup."""
    if path.suffix in (".gz", ".dz"):
        raw = gzip.decompress(raw)
    text = raw.decode("utf-8", errors="ignore").replace("\0", "")
    if path.suffix == ".html":
        parser = _Text()
        parser.feed(text)
        text = "".join(parser.parts)
    elif "/man/" in str(path):
        lines = (line for line in text.splitlines() if not line.startswith(('.\\"', "'\\\"")))
        text = "\n".join(re.sub(r"^\.[A-Za-z]+ ?", "", line) for line in lines)
        text = _ROFF.sub("", text).replace("\\-", "-").replace("\\(aq", "'").replace("\\e", "\\")
    text = re.sub(r"[ \t]+\n", "\n", re.sub(r"[ \t\xa0]{9,}", "        ", text))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def documents(folder: Path, domain: str) -> Iterator[tuple[bool, str]]:
    """(held out, text) of each document of a domain, in an order that a hash of the path shuffles,
    so that a cap on the size takes from all packages."""
    files = []
    for package, pattern in PACKAGES[domain]:
        for path in folder.joinpath(package).glob(pattern):
            if path.is_file() and not path.is_symlink() and path.suffix not in (".dat", ".u8"):
                name = str(path.relative_to(folder))
                files.append((hashlib.sha256(name.encode()).digest(), path))
    few = len(files) < FEW_FILES
    for key, path in sorted(files):
        text = clean(path.relative_to(folder), path.read_bytes())
        pieces = [text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS)]
        for number, piece in enumerate(pieces):
            if len(piece) >= MIN_CHARS:
                mark = hashlib.sha256(key + number.to_bytes(4, "big")).digest() if few else key
                yield mark[-1] % 100 < HELD_OUT, piece


def unpack(debs: Path, folder: Path) -> dict[str, str]:
    """Unpack every package of PACKAGES; return their versions."""
    versions = {}
    for package in sorted({name for parts in PACKAGES.values() for name, _ in parts}):
        found = sorted(debs.glob(f"{package}_*.deb"))
        if not found:
            sys.exit(f"{debs} has no {package}_*.deb; fetch it with: apt-get download {package}")
        subprocess.run(["dpkg-deb", "-x", found[-1], folder / package], check=True)
        field = subprocess.run(
            ["dpkg-deb", "-f", found[-1], "Version"], check=True, capture_output=True, text=True
        )
        versions[package] = field.stdout.strip()
    return versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bytes-per-domain", type=int, default=5_500_000)
    parser.add_argument("--prompts-per-domain", type=int, default=24)
    parser.add_argument("--vocab", type=int, default=16_384)
    args = parser.parse_args()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    args.out.mkdir(parents=True, exist_ok=True)
    train: dict[str, list[str]] = {}
    held_out: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as name:
        versions = unpack(args.packages, Path(name))
        for domain in PACKAGES:
            size = 0
            train[domain], held_out[domain] = [], []
            for held, text in documents(Path(name), domain):
                size += len(text.encode()) * (not held)
                if size > args.bytes_per_domain:
                    break
                (held_out if held else train)[domain].append(text)
            print(
                f"{domain}: {len(train[domain])} documents, {size / 1e6:.1f} MB,"
                f" {len(held_out[domain])} held out",
                flush=True,
            )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sample = [text[:4000] for texts in train.values() for text in texts]
    tokenizer.train_from_iterator(
        sample,
        trainers.BpeTrainer(
            vocab_size=args.vocab,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.save(str(args.out / "tokenizer.json"))

    streams, counts = [], {}
    end = tokenizer.token_to_id(END)
    for domain, texts in train.items():
        ids = [np.array([end, *e.ids], np.uint16) for e in tokenizer.encode_batch_fast(texts)]
        streams += ids
        counts[domain] = int(sum(len(i) for i in ids))
        print(f"{domain}: {counts[domain]:,} tokens", flush=True)
    np.random.default_rng(0).shuffle(streams)
    packed = np.concatenate(streams)
    (args.out / "tokens.xz").write_bytes(lzma.compress(packed.tobytes(), preset=6))

    with (args.out / "prompts.jsonl").open("w", encoding="utf-8") as out:
        for domain, texts in held_out.items():
            for text in texts[: args.prompts_per_domain]:
                record = {"prompt": text[:6000], "domain": domain}
                out.write(json.dumps(record, ensure_ascii=False) + "\n")
    about = {"packages": versions, "train_tokens": counts, "vocab": tokenizer.get_vocab_size()}
    (args.out / "corpus.json").write_text(json.dumps(about, indent=1) + "\n")
    print(f"{len(packed):,} tokens, vocabulary {tokenizer.get_vocab_size():,}")


if __name__ == "__main__":
    main()
