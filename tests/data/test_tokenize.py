"""`dsjax tokenize`: every kind of file, the same shards from any number of processes, one
line for every mistake."""

import gzip
import json
import re
import sys

import numpy as np
import pytest

from dsjax import cli
from dsjax.data.shards import open_corpus, read_index
from dsjax.data.tokenize import is_held_out, tokenize_files
from dsjax.data.tokenizer import FIM, Tokenizer
from dsjax.errors import UserError

TEXTS = [f"Document {n} says {n * n}: naïve café ✓\n" * (1 + n % 7) for n in range(90)]


def jsonl(texts, field="text"):
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A directory with the tokenizer of a first run."""
    root = tmp_path_factory.mktemp("first")
    (root / "a.jsonl").write_text(jsonl(TEXTS))
    tokenize_files([root / "a.jsonl"], root / "out", bpe=280, workers=1)
    return root / "out"


def decoded(directory):
    tokenizer, corpus = Tokenizer.load(directory), open_corpus(directory)
    parts = np.split(corpus.tokens[:], corpus.starts[1:])
    bos, eos = tokenizer.bos_id, tokenizer.eos_ids[0]
    assert all(part[0] == bos and part[-1] == eos for part in parts)
    return [tokenizer.decode(part) for part in parts]


def test_trains_a_bpe_and_writes_the_documents(tokenizer):
    assert decoded(tokenizer) == TEXTS
    index = read_index(tokenizer)
    assert index.vocab_size == 280 and index.documents == len(TEXTS)
    assert index.bytes == sum(len(text.encode()) for text in TEXTS)
    assert Tokenizer.load(tokenizer).fim_ids == (4, 5, 6)
    backend = Tokenizer.load(tokenizer).backend
    assert [backend.encode(mark, add_special_tokens=False).ids for mark in FIM] == [
        [4],
        [5],
        [6],
    ]


def write_as(kind, path, texts):
    """Writes the texts as a file of some kind; returns what to name to the command."""
    match kind:
        case "text":
            path.mkdir()
            for number, text in enumerate(texts):
                (path / f"{number:03d}.md").write_text(text)
            (path / ".hidden").write_bytes(b"\xff")
            return path
        case "jsonl":
            path = path.with_suffix(".jsonl")
            path.write_text(jsonl(texts).replace("\n", "\n\n").removesuffix("\n\n"))
        case "gz":
            path = path.with_suffix(".jsonl.gz")
            path.write_bytes(gzip.compress(jsonl(texts).encode()))
        case "zst":
            zstandard = pytest.importorskip("zstandard")
            path = path.with_suffix(".jsonl.zst")
            path.write_bytes(zstandard.compress(jsonl(texts).encode()))
        case "parquet":
            arrow = pytest.importorskip("pyarrow")
            parquet = pytest.importorskip("pyarrow.parquet")
            path = path.with_suffix(".parquet")
            table = arrow.table({"id": list(range(len(texts))), "text": texts})
            parquet.write_table(table, path, row_group_size=17)
    return path


@pytest.mark.parametrize("kind", ["text", "jsonl", "gz", "zst", "parquet"])
def test_every_kind_of_file_is_read(tokenizer, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("dsjax.data.inputs.PIECE_BYTES", 500)  # several pieces a file
    named = write_as(kind, tmp_path / "in", TEXTS)
    out = tmp_path / "out"
    index = tokenize_files([named], out, tokenizer=tokenizer, workers=1)[""]
    assert decoded(out) == TEXTS
    assert index == read_index(tokenizer)


def test_files_of_several_kinds_keep_their_order(tokenizer, tmp_path):
    kinds = ("text", "parquet", "gz", "jsonl")
    named = [
        write_as(kind, tmp_path / f"in{n}", TEXTS[20 * n : 20 * n + 20])
        for n, kind in enumerate(kinds)
    ]
    out = tmp_path / "out"
    tokenize_files(named, out, tokenizer=tokenizer / "tokenizer.json", workers=1)
    assert decoded(out) == TEXTS[:80]


def test_processes_do_not_change_the_shards(tmp_path, monkeypatch):
    """Several pieces, shards, a split and a BPE: byte for byte the same."""
    monkeypatch.setattr("dsjax.data.inputs.PIECE_BYTES", 10_000)
    texts = [f"{text}{n}" for n in range(10) for text in TEXTS]
    (tmp_path / "a.jsonl").write_text(jsonl(texts))
    for workers in (1, 3):
        tokenize_files(
            [tmp_path / "a.jsonl"],
            tmp_path / str(workers),
            bpe=300,
            workers=workers,
            shard_tokens=10_000,
            held_out_percent=10,
        )
    files = [path for path in (tmp_path / "1").rglob("*") if path.is_file()]
    assert len(list((tmp_path / "1/train").glob("tokens-*.npy"))) > 3
    for path in files:
        other = tmp_path / "3" / path.relative_to(tmp_path / "1")
        assert path.read_bytes() == other.read_bytes(), path
    count = len([p for p in (tmp_path / "3").rglob("*") if p.is_file()])
    assert count == len(files)


def test_copies_fall_on_the_same_side(tmp_path):
    (tmp_path / "a.jsonl").write_text(jsonl(TEXTS + TEXTS[::-1] + [""]))
    out = tmp_path / "out"
    written = tokenize_files(
        [tmp_path / "a.jsonl"], out, bpe=300, workers=1, held_out_percent=30
    )
    train, held_out = decoded(out / "train"), decoded(out / "held_out")
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(TEXTS * 2)
    assert 2 * 15 <= len(held_out) <= 2 * 40
    assert written["train"].tokenizer == written["held_out"].tokenizer
    assert sum(i.bytes for i in written.values()) == 2 * len("".join(TEXTS).encode())


def test_the_bpe_never_sees_held_out_text(tmp_path):
    """A word that stands only in held-out documents gets no token of its own."""
    texts = [f"plain {n} words" for n in range(400)]
    texts = [f"zzqqzzqq {t}" if is_held_out(f"zzqqzzqq {t}", 20) else t for t in texts]
    (tmp_path / "a.jsonl").write_text(jsonl(texts))
    out = tmp_path / "out"
    tokenize_files([tmp_path / "a.jsonl"], out, bpe=300, workers=1, held_out_percent=20)
    assert any("zzqq" in text for text in decoded(out / "held_out"))
    assert len(Tokenizer.load(out / "train").encode("zzqq")) == 1 + 4


# --- mistakes


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": }\n', r"a\.jsonl:3: not JSON: "),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": 1}\n',
            r"a\.jsonl:2: no field 'text' in: b",
        ),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl:1: 'text' is 5, not text"),
        ("a.jsonl", b"[1, 2]\n", r"a\.jsonl:1: no field 'text' in: \[1, 2\]"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1: not JSON: .*utf-8"),
        (
            "a.jsonl",
            b'{"text": "\\ud800"}\n',
            r"a\.jsonl:1: 'text' holds half of a char",
        ),
        ("a.jsonl", b"", r"no documents"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: Not a gzipped file"),
        ("a.txt", b"caf\xe9", r"a\.txt: not UTF-8 at byte 3"),
        ("a.parquet", b"no parquet", r"a\.parquet: "),
    ],
)
def test_a_mistake_is_one_line(tokenizer, tmp_path, capsys, name, content, message):
    workers = 2 if b"\n\n" in content else 1  # one of them from another process
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    arguments = [str(tmp_path / name), str(out), "--tokenizer", str(tokenizer)]
    assert cli.main(["tokenize", *arguments, "--workers", str(workers)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, error), error
    assert {path.name for path in tmp_path.iterdir()} == {name}


def test_line_numbers_count_over_pieces(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("dsjax.data.inputs.PIECE_BYTES", 300)
    lines = jsonl(TEXTS).splitlines()
    lines[70] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"a\.jsonl:71: not JSON"):
        tokenize_files(
            [tmp_path / "a.jsonl"], tmp_path / "o", tokenizer=tokenizer, workers=1
        )


def test_parquet_rows_and_columns_are_named(tokenizer, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"text": ["a", None], "body": ["b", "c"]}), path)
    run = lambda field: tokenize_files(  # noqa: E731
        [path], tmp_path / "out", tokenizer=tokenizer, workers=1, field=field
    )
    with pytest.raises(UserError, match=r"row 2: 'text' is None, not text"):
        run("text")
    with pytest.raises(UserError, match=r"no column 'title' among: text, body"):
        run("title")
    assert run("body")[""].documents == 2


def test_a_missing_library_is_named(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.parquet: .* pip install 'dsjax\[data\]'"):
        tokenize_files(
            [tmp_path / "a.parquet"], tmp_path / "o", tokenizer=tokenizer, workers=1
        )


def test_arguments_are_checked(tokenizer, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    run = lambda *more: cli.main(  # noqa: E731
        ["tokenize", str(tmp_path / "a.txt"), str(tmp_path / "out"), *more]
    )
    assert run("--tokenizer", str(tmp_path)) == 2
    assert "no tokenizer.json" in capsys.readouterr().err
    assert run("--train-bpe", "300", "--held-out-percent", "100") == 2
    assert "held_out_percent=100.0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--train-bpe", "300", "--tokenizer", str(tokenizer))
    assert "not allowed with" in capsys.readouterr().err
    assert run("--train-bpe", "300", "--workers", "1") == 0
    assert "1 documents, 4 bytes, " in capsys.readouterr().out
    assert run("--train-bpe", "300") == 2
    assert "out exists" in capsys.readouterr().err
    missing = str(tmp_path / "missing.txt")
    assert cli.main(["tokenize", missing, "x", "--train-bpe", "300"]) == 2
    assert "missing.txt: no such file" in capsys.readouterr().err
