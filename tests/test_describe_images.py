"""The tool that writes captions, against a server that misbehaves: nothing lost, nothing twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from operator import itemgetter
from pathlib import Path
from typing import Any

import caption_server as chat
import pytest
from caption_server import KEY, answer, status
from dataset_scripts import registered
from detectron2.data import DatasetCatalog, MetadataCatalog

from gella.captions.captioner import Reply
from gella.captions.local import LocalCaptioner
from gella.commands import describe_images as tool
from gella.data.narratives import load_captions

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "describe_images.py"
BAD_NOUNS = json.dumps({"description": "A wall.", "nouns": ["unicorn", "dragon"]})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    with chat.chat_server() as running:
        for name, value in (("URL", running.url), ("MODEL", "tiny-model"), ("KEY", KEY)):
            monkeypatch.setenv(f"GELLA_API_{name}", value)
        yield running


@pytest.fixture
def run(tmp_path: Path, capfd: Any) -> Any:
    """Call the tool on tmp_path/images with quick limits; returns (code, stdout, stderr).

    The captions go to tmp_path/c.jsonl, the report to tmp_path/report.json.
    """

    def call(*extra: str, inputs: tuple[str, ...] = ("--input", str(tmp_path / "images"))) -> tuple:
        quick = ["--timeout", "2", "--backoff", "0.01"]
        files = ["--output", str(tmp_path / "c.jsonl"), "--json", str(tmp_path / "report.json")]
        capfd.readouterr()
        try:
            code = tool.main([*quick, *files, *inputs, *extra])
        except SystemExit as ended:
            code = ended.code
        out, err = capfd.readouterr()
        assert KEY not in out + err
        return code, out, err

    return call


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check_complete(path: Path, truth: dict[int, str]) -> None:
    """Each picture has each prompt exactly once, with the description of that very picture."""
    expected = [
        {
            "image_id": number,
            "file_name": f"{number:012d}.png",
            "description": f"There is a {color} wall behind two dogs.",
            "nouns": [f"{color} wall", "two dogs"],
            "model": "tiny-model",
            "prompt_id": prompt,
        }
        for number, color in truth.items()
        for prompt in ("details", "overview")
    ]
    assert sorted(read(path), key=itemgetter("image_id", "prompt_id")) == expected


def test_nothing_is_lost_and_nothing_twice_whatever_the_server_does(server, run, tmp_path):
    truth = chat.write_pictures(tmp_path / "images", 9)
    server.script = [chat.stall, status(429, Retry_After="0.2"), chat.cut, status(200, b"{broken")]
    server.script += [status(500, KEY.encode()), answer("I cannot write JSON."), answer(BAD_NOUNS)]
    server.script += [chat.cut_chunked, status(429, Retry_After="0.1"), chat.hang_up]
    server.script += [answer('```json\n{"description": "x"}\n```'), status(503)]
    server.default = answer(pause=0.02)
    options = ("--price-in", "1000", "--price-out", "10000", "--answer-attempts", "4")
    code, out, err = run("--concurrency", "3", *options)
    assert code == 0, err
    check_complete(tmp_path / "c.jsonl", truth)
    assert 3 <= server.most_at_once <= 4  # one that was cut may still be ending at the server
    # 12 bad responses, 3 of which are answers of the model that could not be used
    assert len(server.requests) == 18 + 12
    counts = json.loads((tmp_path / "report.json").read_text())["counts"].items()
    assert counts >= {"requests": 30, "retries": 9, "rate_limited": 2}.items()
    assert counts >= {"answers": 21, "rejected": 3}.items()
    assert counts >= {"prompt_tokens": 2100, "completion_tokens": 210}.items()
    assert "18 captions written, 0 were there, 0 failed, 0 to do" in out
    assert "2100 asked, 210 answered; cost 4.2000" in out and "docs/CAPTIONS.md" in out
    assert "9/9" not in err and "18/18" in err
    # Everything is there: no further request, and no model is needed.
    code, out, _ = run()
    assert code == 0 and len(server.requests) == 30 and "18 captions, of which 18" in out


def test_failures_are_counted_listed_and_tried_again_by_the_next_run(server, run, tmp_path):
    truth = chat.write_pictures(tmp_path / "images", 3)
    (tmp_path / "images" / "000000000004.png").write_bytes(b"no picture")

    def picky(handler: Any, request: Any, state: Any) -> None:
        text = chat.good_answer(request)
        if "green" in text:
            return answer(BAD_NOUNS)(handler, request, state)
        if "blue" in text:
            return chat.send(handler, 400, b'{"error": {"message": "not allowed"}}')
        return answer(text)(handler, request, state)

    server.default = picky
    code, out, _ = run("--answer-attempts", "2")
    assert code == 1 and "2 captions written, 0 were there, 6 failed, 6 to do" in out
    assert "run the same command again" in out
    content = json.loads((tmp_path / "report.json").read_text())
    failures = {(f["file_name"], f["prompt_id"]): f["reason"] for f in content["failures"]}
    assert len(failures) == 6
    assert "2 of 2 nouns" in failures["000000000001.png", "details"]
    assert "not allowed" in failures["000000000002.png", "overview"]
    assert "no picture" in failures["000000000004.png", "overview"]
    assert content["captions"] == {"written": 2, "there_before": 0, "failed": 6, "open": 6}
    assert content["counts"]["rejected"] == 4 and content["counts"]["nouns_missing"] == 8
    (tmp_path / "images" / "000000000004.png").unlink()
    server.default = answer()
    code, out, _ = run()
    assert code == 0 and "4 captions written, 2 were there" in out
    check_complete(tmp_path / "c.jsonl", truth)


def test_hopeless_runs_end_early(server, run, tmp_path):
    chat.write_pictures(tmp_path / "images", 30)
    wrong = f'{{"error": {{"message": "{KEY} is wrong"}}}}'.encode()
    # The worker may be asking already when the fourth failure in a row is counted.
    for response, options, message, requests in (
        (status(401, wrong), ("2",), "*** is wrong; check the key", (1, 2)),
        (status(400), ("1", "--max-failures", "4"), "4 captions in a row failed", (4, 5)),
        (status(429, Retry_After="900"), ("1",), "wait 900 s", (1,)),
    ):
        server.requests.clear()
        server.default = response
        code, _, err = run("--concurrency", *options)
        assert code == 2 and len(server.requests) in requests
        assert "error: " in err.splitlines()[-1] and message in err
    assert (tmp_path / "c.jsonl").read_text() == ""


def test_resume_is_exact_after_kill_9(server, run, tmp_path):
    truth = chat.write_pictures(tmp_path / "images", 12)
    path = tmp_path / "c.jsonl"
    server.default = answer(pause=0.1)
    command = [sys.executable, str(TOOL), "--input", str(tmp_path / "images"), "--concurrency", "3"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([*command, "--output", str(path)], **pipes)
    chat.wait_until(
        lambda: process.poll() is not None or (path.exists() and path.read_bytes().count(b"\n") > 4)
    )
    process.send_signal(signal.SIGKILL)
    out, _ = process.communicate(timeout=600)
    assert KEY not in out
    kept = path.read_bytes()
    asked = len(server.requests)
    done = kept.count(b"\n")
    assert 5 <= done < 24, out
    # What a kill in the middle of a write would have left.
    path.write_bytes(kept + b'{"image_id": 3, "file_na')
    server.default = answer()
    code, out, err = run()
    assert code == 0 and f"{24 - done} captions written, {done} were there" in out
    assert "half-written last line" in err
    assert path.read_bytes().startswith(kept)
    assert len(server.requests) - asked == 24 - done  # only what was missing
    check_complete(path, truth)


def interrupt(count: int = 1) -> Any:
    """A behaviour: signals, as of Ctrl-C, to this process, then a good answer or, of two, none."""

    def behave(handler: Any, request: Any, state: Any) -> None:
        for number in range(count):
            time.sleep(0.5 * number)
            os.kill(os.getpid(), signal.SIGINT)
        (answer(pause=0.3) if count == 1 else chat.stall)(handler, request, state)

    return behave


def test_ctrl_c_keeps_what_is_paid_and_says_how_to_go_on(server, run, tmp_path):
    truth = chat.write_pictures(tmp_path / "images", 12)
    path = tmp_path / "c.jsonl"
    server.script = [answer(), answer(), answer(), interrupt()]
    server.default = answer(pause=0.3)
    code, out, err = run("--timeout", "600")
    assert code == 130 and "run the same command again" in out
    assert len(read(path)) == len(server.requests) < 24  # every answer is there
    assert "requests under way are finished" in err
    server.default = answer()
    assert run()[0] == 0
    check_complete(path, truth)


def test_a_second_ctrl_c_cuts_the_requests(server, run, tmp_path):
    chat.write_pictures(tmp_path / "images", 4)
    server.script, server.default = [chat.stall, interrupt(2)], chat.stall
    code, out, err = run("--timeout", "600")
    assert code == 130 and "8 to do" in out and "requests under way are finished" in err


def test_no_file_holds_the_key(server, run, tmp_path):
    chat.write_pictures(tmp_path / "images", 2)
    server.script = [status(500, KEY.encode()), status(400, KEY.encode())]
    server.default = answer(json.dumps({"description": f"A wall, {KEY}.", "nouns": ["wall"]}))
    code, _, err = run("--verbose", "--key", KEY)
    assert code == 1 and "again in" in err
    code, _, err = run("--kye", KEY)
    assert code == 2 and "not known" in err
    texts = [p.read_text() for p in tmp_path.rglob("*") if p.suffix in (".json", ".jsonl")]
    assert len(texts) == 2 and not [text for text in texts if KEY in text]


def test_images_come_from_files_json_or_a_dataset(server, run, tmp_path):
    truth = chat.write_pictures(tmp_path / "images" / "deep", 3)
    path, key = tmp_path / "c.jsonl", itemgetter("image_id", "file_name", "prompt_id")
    names = {number + 100: f"deep/{number:012d}.png" for number in sorted(truth)}
    listing = tmp_path / "list.json"
    images = [{"id": image_id, "file_name": name} for image_id, name in names.items()]
    listing.write_text(json.dumps({"images": images}))
    places = ("--images-json", str(listing), "--image-root", str(tmp_path / "images"))
    assert run("--prompt", "details", "--limit", "2", inputs=places)[0] == 0
    expected = [(image_id, names[image_id], "details") for image_id in (101, 102)]
    assert sorted(map(key, read(path))) == expected
    path.unlink()
    records = [
        {"image_id": image_id, "file_name": str(tmp_path / "images" / name)}
        for image_id, name in names.items()
        for _ in range(2)  # several records of one image: it is described once
    ]
    prompts = tmp_path / "prompts.json"
    prompts.write_text('{"short": "Say what you see."}')
    with registered(DatasetCatalog.register, lambda: records) as name:
        MetadataCatalog.get(name).set(image_root=str(tmp_path / "images"))
        assert run("--prompts", str(prompts), inputs=("--dataset", name))[0] == 0
    assert sorted(map(key, read(path))) == [(*described, "short") for described in names.items()]
    text = server.requests[-1][2]["messages"][0]["content"][0]["text"]
    assert text.startswith("Say what you see.") and '"nouns"' in text


def test_the_captions_are_read_by_the_loader(server, run, tmp_path):
    """docs/FORMATS.md 4, as the training reads it."""
    truth = chat.write_pictures(tmp_path / "images", 2)
    assert run()[0] == 0
    images = [{"id": i, "file_name": f"{i:012d}.png", "height": 24, "width": 32} for i in truth]
    annotations = [{"image_id": i, "file_name": "none.png", "segments_info": []} for i in truth]
    panoptic = {"images": images, "annotations": annotations, "categories": []}
    (tmp_path / "panoptic.json").write_text(json.dumps(panoptic))
    places = (tmp_path / "panoptic.json", tmp_path, tmp_path / "images")
    records = load_captions(tmp_path / "c.jsonl", *places)
    said = [r["caption"][p["start"] : p["end"]] for r in records for p in r["phrases"]]
    assert said == [words for line in read(tmp_path / "c.jsonl") for words in line["nouns"]]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--dataset", "nowhere"), "not registered; there are: gella_"),
        (("--input", "nowhere"), "nowhere does not exist"),
        (("--images-json", "x.json"), "needs --image-root"),
        (("--images-json", "x.json", "--image-root", "."), "x.json does not exist"),
        ((), "exactly one of"),
        (("--input", "images", "--prompt", "poem"), "no prompt 'poem'; there are: overview"),
        (("--input", "images", "--url", "host"), "https://host/v1"),
        (("--input", "images", "--extra", "{"), "--extra is no JSON"),
        (("--input", "images", "--extra", "3"), "--extra must be an object"),
        (("--input", "images", "--timeout", "nan"), "--timeout is nan"),
        (("--input", "images", "--concurrency", "0"), "--concurrency is 0"),
        (("--input", "images", "--min-found", "2"), "--min-found is 2"),
        (("--input", "images", "--local", "m", "--key", "k"), "exclude each other"),
        (("--input", "images", "--local", "./none"), "none does not exist"),
        (("--input", "empty"), "folder empty holds no picture"),
        (("--input", "images", "twins"), "have one image id, 1"),
    ],
)
def test_wrong_input_is_one_line(server, run, tmp_path, monkeypatch, arguments, reason):
    chat.write_pictures(tmp_path / "images", 1)
    chat.write_pictures(tmp_path / "twins", 1)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    code, _, err = run(inputs=arguments)
    assert code == 2 and not server.requests
    assert err.startswith("error: ") and reason in err and err.count("\n") == 1


def test_captions_of_other_images_with_the_same_ids_are_not_mixed(
    server, run, tmp_path, monkeypatch
):
    chat.write_pictures(tmp_path / "images", 1)
    assert run()[0] == 0
    (tmp_path / "images" / "000000000001.png").rename(tmp_path / "images" / "1.png")
    code, _, err = run()
    assert code == 2 and "000000000001.png there, but 1.png here" in err
    monkeypatch.delenv("GELLA_API_URL")
    code, _, err = run()
    assert code == 2 and "use --url or set GELLA_API_URL" in err


def test_a_local_model_takes_the_place_of_the_endpoint(run, tmp_path, tokenizer_dir, monkeypatch):
    """Random weights write garbage: it is rejected with a count, and nothing of it is written."""
    chat.write_pictures(tmp_path / "images", 1)
    chat.save_tiny_llava(tmp_path / "llava", tokenizer_dir)
    limits = ("--max-tokens", "5", "--answer-attempts", "2")
    code, out, _ = run("--local", str(tmp_path / "llava"), *limits)
    assert code == 1 and "0 captions written, 0 were there, 2 failed" in out
    assert json.loads((tmp_path / "report.json").read_text())["counts"]["rejected"] == 4
    assert (tmp_path / "c.jsonl").read_text() == ""

    def ask(self: Any, text: str, picture: Any, *, attempt: int = 0) -> Reply:
        return Reply("A dog on sand." if picture is not None else "dog, sand", 9, 5)

    monkeypatch.setattr(LocalCaptioner, "ask", ask)
    assert run("--local", str(tmp_path / "llava"))[0] == 0
    lines = [(line["model"], line["nouns"]) for line in read(tmp_path / "c.jsonl")]
    assert lines == [("llava", ["dog", "sand"])] * 2
