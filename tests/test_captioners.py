"""Captioners: answers made usable, an endpoint that misbehaves, a local model, the file."""

from __future__ import annotations

import gzip
import io
import json
import logging
import random
import subprocess
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path
from typing import Any

import caption_server as chat
import numpy as np
import pytest
import torch
from caption_server import KEY, answer, status
from PIL import Image

from gella.captions.captioner import (
    PROMPTS,
    AnswerError,
    EndpointError,
    Reply,
    RequestError,
    StoppedError,
    Tally,
    clean_description,
    describe,
    load_picture,
    match_nouns,
    parse_json_answer,
    parse_noun_list,
)
from gella.captions.endpoint import EndpointCaptioner, EndpointSettings
from gella.captions.local import LocalCaptioner
from gella.commands.describe_images import choose_prompts
from gella.text.spans import locate_phrases

# -- answers ---------------------------------------------------------------------------------------

GOOD = {"description": "A dog sits.", "nouns": ["dog"]}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (json.dumps(GOOD), None),
        (f"```json\n{json.dumps(GOOD, indent=1)}\n```", None),
        (f"Sure! Here {{it}} is:\n{json.dumps(GOOD)}\nAnything else?", None),
        ('<think>{"a": 1}</think>{"description": "A dog\n sits.", "nouns": ["dog",],}', None),
        (json.dumps({**GOOD, "nouns": [{"noun": "dog", "color": "?"}, 3, ""]}), None),
        (json.dumps({**GOOD, "nouns": "dog"}), None),
        (json.dumps({"answer": GOOD}), None),
        ("", "no JSON object"),
        ("A dog sits.", "no JSON object"),
        (json.dumps(GOOD)[:-5], "no JSON object"),
        ('{"description": 3, "nouns": []}', "no JSON object"),
        ('{"description": "A dog."}', 'no "nouns"'),
        ('{"description": "A dog.", "nouns": 3}', "not a list"),
        ('{"description": " .", "nouns": ["a"]}', "empty"),
        ('{"description": "A <SEG> dog.", "nouns": ["dog"]}', "<SEG>"),
        ("{" * 100_000, "no JSON object"),
        ('{"a":' * 100_000, "no JSON object"),
    ],
)
def test_json_answers_are_found_or_refused_with_a_reason(text, reason):
    if reason is None:
        assert parse_json_answer(text) == ("A dog sits.", ["dog"])
    else:
        with pytest.raises(AnswerError, match=reason):
            parse_json_answer(text)


def test_descriptions_become_one_writable_line():
    assert clean_description(" A dog\n\n sits \ud83d.\x00 ") == "A dog sits ?."


def test_noun_lists_are_read_in_any_form():
    listed = ('["red car", "dogs"]', '{"nouns": ["red car", "dogs"]}', "1. red car\n2. dogs")
    for text in (*listed, "red car, dogs.", "red car, and dogs", "- red car\n* and dogs\n"):
        assert parse_noun_list(text) == ["red car", "dogs"], text


@pytest.mark.parametrize(
    ("description", "nouns", "expected", "missing"),
    [
        ("A Red Car stands.", ["red  car"], ["Red Car"], []),
        ("Two dogs run.", ["dog"], ["dogs"], []),
        ("A puppy runs.", ["puppies"], ["puppy"], []),
        ("One box.", ["boxes"], ["box"], []),
        ("Some people wait.", ["person"], ["people"], []),
        ("The old men wait.", ["an old man"], ["old men"], []),
        ("He wears a t-shirt.", ["T shirt"], ["t-shirt"], []),
        ("A man\u2019s hat.", ["man's hat"], ["man\u2019s hat"], []),
        ("His hat.", ["the three hats"], ["hat"], []),
        ("Sky over grass.", ["grass", "sky"], ["Sky", "grass"], []),  # order repaired
        ("A cart.", ["art", "car"], [], ["art", "car"]),  # only whole words
        ("A dog.", ["cat", "dog", "...", ""], ["dog"], ["cat", "...", ""]),
        ("A princess.", ["prince"], [], ["prince"]),
    ],
)
def test_nouns_are_repaired_or_missing(description, nouns, expected, missing):
    match = match_nouns(description, nouns)
    assert match.nouns == expected and sorted(match.missing) == sorted(missing)


def test_nested_and_repeated_nouns():
    match = match_nouns("A red hat beside a hat.", ["hat", "red hat", "hat"])
    assert match.nouns == ["red hat", "hat"] and match.spans == [(2, 9), (19, 22)]
    assert match.merged == ["hat"] and match.missing == [] and match.found_share == 1
    assert match_nouns("A dog.", []).found_share == 0


def test_the_loader_finds_the_same_places():
    """Whatever the nouns: the reader of captions walks them back to the very same spans."""
    rng = random.Random(0)
    words = ["a", "the", "red", "dog", "dogs", "hot", "hot dog", "Cat", "t-shirt", "wall", "two"]
    kept = 0
    for _ in range(400):
        description = " ".join(rng.choices(words, k=rng.randint(1, 12))) + "."
        nouns = [
            " ".join(rng.choices(words, k=rng.randint(1, 3))) for _ in range(rng.randint(0, 6))
        ]
        match = match_nouns(description, nouns)
        assert locate_phrases(description, match.nouns) == match.spans
        assert len(match.nouns) + len(match.merged) + len(match.missing) == len(nouns)
        kept += len(match.nouns)
    assert kept > 250


class Scripted:
    """A captioner that answers from a list and remembers what it was asked."""

    model, mode = "scripted", "json"

    def __init__(self, *answers: Any) -> None:
        self.answers, self.asked = list(answers), []

    def ask(self, text: str, picture: bytes | None, *, attempt: int = 0) -> Reply:
        self.asked.append((text, picture, attempt))
        given = self.answers.pop(0)
        return given if isinstance(given, Reply) else Reply(given)


def test_describe_asks_again_until_enough_nouns_stand_in_the_text():
    few = json.dumps({"description": "A dog.", "nouns": ["dog", "cat"]})
    nouns = "dog, cats, cow, pig, hen"
    most = json.dumps({"description": "A dog, a cat, a cow, a pig.", "nouns": nouns})
    captioner, tally = Scripted("hm", few, Reply(most, complete=False), most), Tally()
    picture = b"JPEG"
    caption = describe(captioner, picture, "Look.", attempts=4, tally=tally)
    assert caption.nouns == ["dog", "cat", "cow", "pig"]
    assert [asked[1:] for asked in captioner.asked] == [(picture, number) for number in range(4)]
    expected = {"rejected": 3, "answers": 4, "nouns": 4, "nouns_repaired": 1, "nouns_dropped": 1}
    assert tally.as_dict().items() >= expected.items()
    with pytest.raises(AnswerError, match="1 of 5 nouns.*'hen'"):
        describe(Scripted(most), picture, attempts=1, min_found=1.0)
    with pytest.raises(AnswerError, match="none of 2 answers.*no JSON"):
        describe(Scripted("a", "b"), picture, attempts=2)


def test_two_steps_ask_for_the_nouns_of_the_description():
    captioner, picture = Scripted(" A red  car on grass. ", "car, grass"), b"JPEG"
    caption = describe(captioner, picture, mode="two-steps")
    assert caption.description == "A red car on grass." and caption.nouns == ["car", "grass"]
    (first, shown, _), (second, nothing, _) = captioner.asked
    assert PROMPTS["overview"] in first and shown is picture
    assert "A red car on grass." in second and nothing is None
    with pytest.raises(ValueError, match="unknown mode"):
        describe(captioner, picture, mode="xml")


def test_pictures_are_bounded_and_carry_no_metadata(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    exif[0x010F] = "SecretCamera"
    path = tmp_path / "a.jpg"
    Image.fromarray(np.zeros((40, 80, 3), np.uint8)).save(path, exif=exif)
    for upright, size in ((False, (40, 20)), (True, (20, 40))):
        picture = load_picture(path, max_side=40, upright=upright)
        assert b"SecretCamera" not in picture
        assert Image.open(io.BytesIO(picture)).size == size
    small = load_picture(np.zeros((3, 500, 3), np.uint8), max_side=50)
    assert Image.open(io.BytesIO(small)).size == (50, 1)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="truncated"):
        load_picture(path)


def test_prompt_files_are_checked(tmp_path):
    path = tmp_path / "prompts.json"
    for content, reason in (("{", "not a JSON"), ("[]", "at least one"), ('{"a": " "}', "'a'")):
        path.write_text(content)
        with pytest.raises(ValueError, match=reason):
            choose_prompts(path)
    path.write_text('{"short": "Describe."}')
    assert choose_prompts(path) == {"short": "Describe."}
    with pytest.raises(FileNotFoundError, match="does not exist"):
        choose_prompts(tmp_path / "none.json")


# -- the endpoint ----------------------------------------------------------------------------------


@pytest.fixture
def server() -> Any:
    with chat.chat_server() as running:
        running.default = answer("hello")
        yield running


def client(server: Any, key: str | None = KEY, **settings: Any) -> EndpointCaptioner:
    quick = {"timeout": 5.0, "backoff": 0.01, "retries": 2}
    limits = EndpointSettings(**{**quick, **settings})
    return EndpointCaptioner(server.url, "tiny", key, settings=limits)


def test_the_request_is_a_chat_completion(server):
    captioner = client(server, max_tokens=7, extra={"temperature": 0.0, "seed": 3})
    reply = captioner.ask("What?", b"abc")
    assert reply == Reply("hello", 100, 10)
    _, headers, body = server.requests[0]
    assert headers["Authorization"] == f"Bearer {KEY}"
    image = {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,YWJj"}}
    assert body.pop("messages") == [
        {"role": "user", "content": [{"type": "text", "text": "What?"}, image]}
    ]
    assert body == {"model": "tiny", "max_tokens": 7, "temperature": 0.0, "seed": 3}
    client(server, None, extra={"max_tokens": None, "temperature": 0}).ask("Why?", None, attempt=1)
    _, headers, body = server.requests[1]
    assert "Authorization" not in headers and "max_tokens" not in body
    assert body["messages"] == [{"role": "user", "content": "Why?"}] and body["temperature"] == 0.7


@pytest.mark.parametrize(
    "failure",
    [
        status(500),
        status(503, b"<html>busy</html>"),
        status(408),
        status(200, b"{"),
        status(200, b"[]"),
        status(200, b'{"choices": []}'),
        status(200, b'{"error": {"message": "upstream", "code": 502}}'),
        chat.cut,
        chat.cut_chunked,
        chat.hang_up,
    ],
)
def test_failures_that_may_pass_are_retried(server, failure):
    server.script = [failure, failure]
    captioner = client(server)
    picture = load_picture(np.zeros((8, 8, 3), np.uint8))
    assert captioner.ask("What?", picture).text == "hello"
    assert len(server.requests) == 3 and captioner.tally["retries"] == 2
    server.script = [failure] * 3
    with pytest.raises(RequestError, match=r"asked 3 times"):
        captioner.ask("What?", picture)
    assert len(server.requests) == 6


@pytest.mark.parametrize("behaviour", [chat.stall, chat.dribble])
def test_a_request_has_one_time_limit_however_the_server_stalls(server, behaviour):
    server.script = [behaviour]
    captioner = client(server, timeout=0.4)
    assert captioner.ask("What?", None).text == "hello" and captioner.tally["retries"] == 1
    server.script = [behaviour]
    with pytest.raises(RequestError, match="no complete answer within 0.4 s"):
        client(server, timeout=0.4, retries=0).ask("What?", None)


def test_answers_beyond_the_size_are_not_read(server):
    server.default = answer("x" * 5000)
    with pytest.raises(RequestError, match="larger than 4000 bytes"):
        client(server, max_bytes=4000, retries=0).ask("What?", None)
    assert len(client(server, max_bytes=6000).ask("What?", None).text) == 5000
    zipped = gzip.compress(chat.completion("x" * 10**6))
    server.default = status(200, zipped, Content_Encoding="gzip")
    with pytest.raises(RequestError, match="compressed"):
        client(server, max_bytes=4000, retries=0).ask("What?", None)


@pytest.mark.parametrize(
    ("response", "error", "message"),
    [
        (status(401, b'{"error": "bad key"}'), EndpointError, "bad key; check the key"),
        (status(404, b'{"error": "no model"}'), EndpointError, "no model; check the address"),
        (status(402), EndpointError, "quota"),
        (status(429, b'{"error": {"code": "insufficient_quota"}}'), EndpointError, "quota"),
        (status(307, b"", Location="http://127.0.0.1:9/v2?x=1"), EndpointError, ":9/v2: give"),
        (status(400, b'{"error": {"message": "odd image"}}'), RequestError, "400: odd image"),
        (status(413), RequestError, "--max-side"),
        (status(429, Retry_After="3600"), EndpointError, "3600 s, more than 300 s"),
        (status(200, chat.completion(None, refusal="I won't")), AnswerError, "I won't"),
        (answer("", finish="content_filter"), AnswerError, "content filter"),
        (answer("  "), AnswerError, "empty"),
    ],
)
def test_failures_that_stay_are_not_retried(server, response, error, message):
    server.default = response
    with pytest.raises(error, match=message):
        client(server).ask("What?", None)
    assert len(server.requests) == 1


def test_answers_in_parts_and_without_usage(server):
    body = json.loads(chat.completion([{"type": "text", "text": "a"}, {"text": "b"}, {"x": 1}]))
    del body["usage"]
    server.default = status(200, json.dumps(body).encode())
    captioner = client(server)
    assert captioner.ask("What?", None) == Reply("ab")
    assert captioner.tally["answers_without_usage"] == 1
    server.default = answer("cut", finish="length")
    assert not captioner.ask("What?", None).complete


def test_retry_after_is_kept_in_seconds_and_as_a_date(server):
    now = 1_700_000_000
    for value in ("0.3", formatdate(now + 1, usegmt=True)):
        server.requests.clear()
        # The date counts from the server's own clock, which is years behind.
        server.script = [status(429, Retry_After=value, Date=formatdate(now, usegmt=True))]
        captioner = client(server)
        captioner.ask("What?", None)
        (first, _, _), (second, _, _) = server.requests
        assert second - first >= (0.3 if value == "0.3" else 1.0)
        assert captioner.tally["rate_limited"] == 1
    server.requests.clear()
    server.script = [status(503, Retry_After="0.3")]  # busy, which is no rate limit
    assert captioner.ask("What?", None).text == "hello"
    assert server.requests[1][0] - server.requests[0][0] >= 0.3
    assert captioner.tally["rate_limited"] == 1


def test_a_rate_limit_stops_all_threads_and_is_no_failure(server):
    """Three threads; after the first 429 no request may come before its second is over."""
    server.script = [status(429, Retry_After="0.5")] + [status(429, Retry_After="0.1")] * 4
    captioner = client(server, retries=0)
    with ThreadPoolExecutor(3) as pool:
        replies = [pool.submit(captioner.ask, "What?", None)]
        chat.wait_until(lambda: captioner.tally["rate_limited"] > 0)
        replies += [pool.submit(captioner.ask, "What?", None) for _ in range(2)]
    assert [reply.result().text for reply in replies] == ["hello"] * 3
    first, *others = (when for when, _, _ in server.requests)
    assert min(others) - first >= 0.5
    assert captioner.tally["rate_limited"] == 5


@pytest.mark.parametrize(
    ("behaviour", "settings", "end"),
    [(status(500), {"backoff": 60.0}, "stop")],
)
def test_stop_ends_pauses_and_abort_cuts_requests(server, behaviour, settings, end):
    server.default = behaviour
    captioner = client(server, retries=1, **settings)
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(captioner.ask, "What?", None)
        chat.wait_until(lambda: len(server.requests) > 0)
        getattr(captioner, end)()
        with pytest.raises(StoppedError):
            reply.result(30)
    with pytest.raises(StoppedError):
        captioner.ask("What?", None)


def test_the_key_is_in_no_message_log_or_repr(server, caplog):
    caplog.set_level(logging.DEBUG)
    echo = f'{{"error": {{"message": "key {KEY} is wrong"}}}}'.encode()
    captioner = client(server, retries=1)
    texts = [repr(captioner), str(vars(captioner.settings))]
    behaviours = [status(401, echo), status(500, echo), status(400, KEY.encode())]
    behaviours += [status(302, b"", Location=f"http://x/{KEY}"), answer(f"Your key is {KEY}.")]
    for behaviour in behaviours:
        server.default = behaviour
        try:
            texts.append(captioner.ask("What?", None).text)
        except (EndpointError, RequestError) as error:
            texts.append(repr(error) + repr(error.__context__) + repr(error.__cause__))
    server.default = status(401, b"wrong key abc123")
    with pytest.raises(EndpointError, match=r"wrong key \*\*\*;"):
        client(server, "abc123").ask("What?", None)
    assert len(texts) == 7 and "***" in texts[2]
    assert not [text for text in [*texts, caplog.text] if KEY in text or KEY[:20] in text]


@pytest.mark.parametrize(
    ("url", "key", "reason"),
    [(url, "", "https://host/v1") for url in ("", "host/v1", "ftp://h", "http://", "http://h:x/")]
    + [("http://a b", "", "https://host/v1"), (f"http://me:{KEY}@host/v1", "", "user or password")]
    + [("http://h", KEY + bad, "the key holds") for bad in ("new\nline", "sn\u00f6w", "two words")],
)
def test_addresses_and_keys_that_cannot_be_right(url, key, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        EndpointCaptioner(url, "tiny", key)
    assert KEY[:20] not in str(caught.value)


def test_addresses_and_the_environment(monkeypatch):
    for name in ("URL", "MODEL", "KEY"):
        monkeypatch.delenv(f"GELLA_API_{name}", raising=False)
    with pytest.raises(ValueError, match="GELLA_API_URL"):
        EndpointCaptioner.from_environment(model="m")
    monkeypatch.setenv("GELLA_API_URL", "https://host/v1/?version=2")
    with pytest.raises(ValueError, match="GELLA_API_MODEL"):
        EndpointCaptioner.from_environment()
    monkeypatch.setenv("GELLA_API_MODEL", "m")
    captioner = EndpointCaptioner.from_environment()
    assert captioner.address == "https://host/v1/chat/completions" and captioner.model == "m"
    full = EndpointCaptioner.from_environment(url="https://h:8/chat/completions", model="n")
    assert full.address == "https://h:8/chat/completions" and full.model == "n"


def test_proxies_of_the_environment_are_used_but_not_for_this_machine(server, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", server.url.rsplit("/", 1)[0])
    far = EndpointCaptioner("http://far.invalid/v1?a=b", "tiny", settings=EndpointSettings())
    seen = []

    def note(handler: Any, request: Any, state: Any) -> None:
        seen.append(handler.path)
        answer("by proxy")(handler, request, state)

    server.script = [note]
    assert far.ask("What?", None).text == "by proxy"
    assert seen == ["http://far.invalid/v1/chat/completions?a=b"]
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert client(server).ask("What?", None).text == "hello"


def test_certificates_are_checked(tmp_path, monkeypatch):
    import ssl

    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    command = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext".split()
    names = ["subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run(["openssl", *command, *names], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no openssl program that makes a certificate")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with chat.chat_server(context) as secure:
        secure.default = answer("hello")
        with pytest.raises(EndpointError, match="certificate.*SSL_CERT_FILE"):
            client(secure).ask("What?", None)
        assert not secure.requests
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert client(secure).ask("What?", None).text == "hello"
        secure.default = chat.stall  # the time limit reaches below TLS too
        with pytest.raises(RequestError, match="within 0.5 s"):
            client(secure, timeout=0.5, retries=0).ask("What?", None)


# -- a local model ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava(tmp_path_factory: Any, tokenizer_dir: Path) -> Path:
    """A LLaVA of random weights with its processor, as transformers saves it."""
    return chat.save_tiny_llava(tmp_path_factory.mktemp("llava"), tokenizer_dir)


def test_a_local_model_answers_about_the_picture(llava):
    captioner = LocalCaptioner(str(llava), max_tokens=6)
    pictures = [load_picture(np.full((20, 30, 3), shade, np.uint8)) for shade in (0, 250)]
    replies = [captioner.ask("What?", picture) for picture in (*pictures, None)]
    assert captioner.ask("What?", pictures[0]) == replies[0]  # greedy
    assert replies[0].prompt_tokens - replies[2].prompt_tokens >= 4  # 2 x 2 patches
    for reply in replies:
        assert reply.complete == (reply.completion_tokens < 6) and reply.completion_tokens <= 6
    assert captioner.tally["requests"] == 4
    captioner.stop()
    with pytest.raises(StoppedError):
        captioner.ask("What?", None)


def test_a_local_model_is_asked_in_its_own_template(llava, monkeypatch):
    captioner = LocalCaptioner(str(llava), max_tokens=400)
    tokenizer, seen = captioner._processor.tokenizer, []

    def generate(input_ids: Any, **options: Any) -> Any:
        text = tokenizer.decode(input_ids[0]).replace("<image>", "").replace(" ", "")
        seen.append((text, options["do_sample"], tuple(options["pixel_values"].shape)))
        return torch.cat([input_ids, torch.tensor([tokenizer("a star</s>")["input_ids"]])], dim=1)

    monkeypatch.setattr(captioner._model, "generate", generate)
    picture = load_picture(np.zeros((20, 30, 3), np.uint8))
    reply = captioner.ask("What?", picture, attempt=1)
    assert reply.text == "a star" and reply.complete
    captioner._processor.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{% for c in m.content %}"
        "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    captioner.ask("What?", picture)
    assert [drawn[1:] for drawn in seen] == [(True, (1, 3, 16, 16)), (False, (1, 3, 16, 16))]
    assert seen[0][0].endswith("USER:\nWhat?ASSISTANT:") and seen[1][0].endswith("<user>What?")


def test_local_models_that_cannot_be_read(tmp_path, tokenizer_dir):
    for folder, message in ((tmp_path / "none", "does not exist"), (tokenizer_dir, "image-text")):
        with pytest.raises(FileNotFoundError, match=message):
            LocalCaptioner(str(folder))
    with pytest.raises(ValueError, match="unknown dtype"):
        LocalCaptioner(str(tmp_path), dtype="int4")
