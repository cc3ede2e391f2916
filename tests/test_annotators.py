"""Sentences by how their annotators agree, from an archive of the package's form."""

import io
import sys
import tarfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "research"))
import annotators

RATED = {
    "loved  it": [3, 2, 4, 1],  # agreed
    "hated it": [-1, -2, 0, -1],
    "odd": [2, -2, 3, -1],  # disputed, half and half
    "mixed": [1, -1, 2, 3],
    "dull": [0, 0, 0, -1],  # neutral
    "nearly": [1] * 9 + [-1],  # a tenth
}


def packed(files):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


@pytest.fixture
def archive(tmp_path):
    truth = "".join(f"{i}\t0.5\t{sentence}\n" for i, sentence in enumerate(RATED))
    given = "".join(f"{i}\t0.5\t1.0\t{rated}\n" for i, rated in enumerate(RATED.values()))
    files = {"GroundTruth": truth, "anonDataRatings": "\ufeff" + given}
    inner = packed({f"hutto_ICWSM_2014/tweets_{name}.txt": text.encode() for name, text in files.items()})
    path = tmp_path / "package.tar.gz"
    path.write_bytes(packed({"v/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    return path


def test_sentences_are_parted_by_how_their_annotators_agree(archive, tmp_path, monkeypatch, capsys):
    arguments = ["annotators.py", str(archive), "--kind", "tweets", "--folder", str(tmp_path / "data")]
    monkeypatch.setattr(sys, "argv", arguments)
    annotators.main()
    read = {name: (tmp_path / "data" / f"{name}.tsv").read_text().splitlines() for name in ("agreed", "disputed")}
    assert read["agreed"] == ["label\tsentence", "positive\tloved it", "negative\thated it"]
    assert [line.split("\t")[1] for line in read["disputed"]] == ["sentence", "odd", "mixed", "nearly"]
    assert "3 disputed, 28 % of the labels in the minority; 2 agreed on" in capsys.readouterr().out


def test_a_disputed_sentence_has_the_label_of_one_annotator(archive):
    rated = annotators.ratings(archive, "tweets")
    drawn = [dict(map(reversed, annotators.parted(rated, 0.2, seed)[0])) for seed in range(400)]
    assert all(labels.keys() == {"odd", "mixed"} for labels in drawn)
    for sentence, positive in {"odd": 0.5, "mixed": 0.75}.items():
        assert sum(labels[sentence] == "positive" for labels in drawn) / 400 == pytest.approx(positive, abs=0.09)


def test_another_archive_is_refused(tmp_path):
    (tmp_path / "other.tar.gz").write_bytes(packed({"a": b"b"}))
    with pytest.raises(SystemExit, match="holds no hutto_ICWSM_2014"):
        annotators.ratings(tmp_path / "other.tar.gz", "tweets")
