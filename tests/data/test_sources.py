"""Reading text: every kind of file, deterministic order, and one clear line for bad input."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from tpu_stack.data.sources import Document, default_corpus, read_documents
from tpu_stack.errors import UserError


def write_json_lines(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_a_folder_is_read_recursively_in_sorted_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "z.txt").write_text("zed")
    (tmp_path / "b" / "c.py").write_text("x = 1\n")
    (tmp_path / "a.MD").write_text("# é")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / ".hidden" / "d.txt").write_text("hidden")
    (tmp_path / ".e.txt").write_text("hidden")
    assert read_documents([tmp_path]) == [
        Document("# é", "a.MD"),
        Document("x = 1\n", "b/c.py"),
        Document("zed", "z.txt"),
    ]


def test_a_file_named_twice_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    documents = read_documents([tmp_path / "b.txt", tmp_path, str(tmp_path)])
    assert [document.name for document in documents] == ["b.txt", "a.txt"]


def test_text_keeps_its_line_endings_and_loses_its_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert read_documents([tmp_path / "a.txt"])[0].text == "one\r\ntwo\n"


def test_json_lines_plain_and_gzipped(tmp_path):
    records = [{"text": "one\u2028two"}, {"text": ""}, {"text": "drei ü", "id": 3}]
    plain = write_json_lines(tmp_path / "a.jsonl", records)
    zipped = tmp_path / "b.jsonl.gz"
    zipped.write_bytes(gzip.compress(b"\n" + plain.read_bytes()))
    assert read_documents([plain, zipped]) == [
        Document("one\u2028two", "a.jsonl:1"),
        Document("drei ü", "a.jsonl:3"),
        Document("one\u2028two", "b.jsonl.gz:2"),
        Document("drei ü", "b.jsonl.gz:4"),
    ]


def test_parquet_and_another_text_field(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"content": ["one", "zwei ü"], "id": [1, 2]}), path)
    assert read_documents([path], text_field="content") == [
        Document("one", "a.parquet:1"),
        Document("zwei ü", "a.parquet:2"),
    ]


def test_names_do_not_depend_on_where_the_corpus_lies(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place / "sub").mkdir(parents=True)
        (tmp_path / place / "sub" / "a.txt").write_text("a")
    here, there = (read_documents([tmp_path / place]) for place in ("here", "there"))
    assert here == there == [Document("a", "sub/a.txt")]


# No time in it: the bytes are part of a test's name, which every worker must come to alike.
CUT_SHORT = gzip.compress(b'{"text": "x"}\n', mtime=0)[:-9]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.docx", b"x", r"a\.docx: the suffix is not one of \.txt, \.md, \.py"),
        ("a.txt", b"ok \xff", r"a\.txt is not UTF-8 text: byte 0xff at offset 3"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', r"a\.jsonl:2 is not valid JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1 is not valid JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1 is not UTF-8"),
        ("a.jsonl", b'{"prompt": "x"}\n', r"a\.jsonl:1 has no field 'text'; its fields: prompt"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1 is a JSON list, not an object"),
        ("a.jsonl", b'{"text": null}\n', r"a\.jsonl:1: field 'text' is NoneType, not text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1: field 'text' has a lone surrogate"),
        ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz: damaged gzip data"),
        ("a.jsonl.gz", CUT_SHORT, r"a\.jsonl\.gz: damaged gzip"),
        ("a.parquet", b"not parquet", r"a\.parquet as Parquet"),
        ("a.txt", b"", r"the corpus is empty: no text in .*a\.txt"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_documents([tmp_path / name])
    assert "\n" not in str(caught.value)


def test_bad_parquet_fields(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["x", None], "id": [1, 2]}), path)
    with pytest.raises(UserError, match=r"a\.parquet has no field 'body'; its fields: text, id"):
        read_documents([path], text_field="body")
    with pytest.raises(UserError, match=r"a\.parquet:1: field 'id' is int"):
        read_documents([path], text_field="id")
    with pytest.raises(UserError, match=r"a\.parquet:2: field 'text' is NoneType"):
        read_documents([path])


def test_missing_and_empty_places(tmp_path):
    with pytest.raises(UserError, match=r"no such file or folder: .*nowhere"):
        read_documents([tmp_path / "nowhere"])
    (tmp_path / "picture.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"holds no file ending in \.txt"):
        read_documents([tmp_path])
    with pytest.raises(UserError, match="the corpus is empty: no text in no paths were given"):
        read_documents([])


def test_default_corpus_is_the_standard_library():
    documents = default_corpus()
    names = [document.name for document in documents]
    assert names == sorted(set(names))
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not any(name.startswith(("test/", "site-packages/", "idlelib/")) for name in names)
    assert sum(len(document.text) for document in documents) > 3_000_000


def test_default_corpus_skips_what_is_not_utf8_and_says_when_nothing_is_left(tmp_path):
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.py").write_text("a = 1")
    with pytest.raises(UserError, match="no standard-library sources in"):
        default_corpus(tmp_path)
    (tmp_path / "good.py").write_text("b = 2")
    assert default_corpus(tmp_path) == [Document("b = 2", "good.py")]
