"""An endpoint with OpenAI's interface as a teacher: a real language model behind a real server of this machine."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd import plugins
from edgekd.console import progress_for
from edgekd.distillation.losses import soft_target_kl
from edgekd.errors import DataError, UsageError
from edgekd.metrics import softmax
from edgekd.origins.openai import BOUNDED, UNLISTED, UNNAMED, named_classes
from edgekd.recipes.reading import load_recipe
from edgekd.stages.members import teacher_sentences
from edgekd.stages.pipeline import capture_stage
from edgekd.stages.workspace import Workspace
from edgekd.teachers.sources import load_teacher
from edgekd.teachers.targets import codec_of
from edgekd.teaching import Teacher

WORDS = ["<unk>", "spam", "ham", "cheap", "pills", "hello", "friend", "is", "it", "now", "buy", "write", "Answer", ":"]
KEY = "sk-never-to-be-written"


class Language(nn.Module):
    """A causal language model: logits of the next token at each position."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.words, self.gates = nn.Embedding(vocabulary, 16), nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        return 8 * self.head(self.gates(self.words(ids))[0])


class Service(ThreadingHTTPServer):
    """What ``/v1/completions`` and ``/v1/chat/completions`` are documented to answer, from a small language model.

    Attributes:
        faults: Status codes with which the next requests are answered, and what they say to wait.
        faults_of: The same of requests that hold a text, each time.
        seen: Requests, with their key.
        dies_after: Requests after which every answer is 500.
    """

    daemon_threads = True

    def __init__(self) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers

        super().__init__(("127.0.0.1", 0), Handler)
        self.tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
        self.tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        torch.manual_seed(0)
        self.model = Language(len(WORDS)).eval()
        self.lock = threading.Lock()
        self.faults: list[tuple[int, dict[str, str]]] = []
        self.faults_of: dict[str, tuple[int, dict[str, str]]] = {}
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.dies_after = 10**9

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def log_probabilities(self, prompt: str) -> np.ndarray:
        """Of the next token."""
        with torch.no_grad():
            logits = self.model(torch.tensor([self.tokenizer.encode(prompt).ids]))[0, -1]
        made: np.ndarray = logits.log_softmax(0).numpy()
        return made


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.headers.get("Authorization", ""), asked))
            fault = self.server.faults.pop(0) if self.server.faults else None
            fault = next((one for text, one in self.server.faults_of.items() if text in json.dumps(asked)), fault)
            if len(self.server.seen) > self.server.dies_after:
                fault = 500, {}
        if fault is not None:
            self.answer(fault[0], {"error": f"no; you sent {self.headers.get('Authorization', '')}"}, fault[1])
            return
        if asked.get("echo"):
            self.answer(200, {"choices": [{"logprobs": self.of_the_text(asked)}]})
            return
        chat = self.path.endswith("/chat/completions")
        prompt = asked["messages"][0]["content"] if chat else asked["prompt"]
        count = asked.get("top_logprobs" if chat else "logprobs")
        values = self.server.log_probabilities(prompt)
        order = np.argsort(-values)[: int(count or 0)].tolist()
        listed = [(WORDS[i] if chat else f" {WORDS[i]}", float(values[i])) for i in order]
        if asked["model"] == "silent":
            self.answer(200, {"choices": [{"text": "ham", "logprobs": None}]})
        elif chat:
            entries = [{"token": token, "logprob": value, "bytes": None} for token, value in listed]
            self.answer(200, {"choices": [{"logprobs": {"content": [{**entries[0], "top_logprobs": entries}]}}]})
        else:
            self.answer(200, {"choices": [{"text": listed[0][0], "logprobs": {"top_logprobs": [dict(listed)]}}]})

    def of_the_text(self, asked: dict[str, Any]) -> dict[str, Any]:
        """As vLLM answers ``echo`` with one more token: nothing is known before the first of the prompt."""
        with torch.no_grad():
            values = self.server.model(torch.tensor([asked["prompt"]]))[0].log_softmax(1).numpy()
        ids = [*asked["prompt"], int(values[-1].argmax())]
        as_ids = asked.get("return_tokens_as_token_ids") and asked["model"] != "old"
        names = [f"token_id:{i}" if as_ids else WORDS[i] for i in range(len(WORDS))]
        tops: list[Any] = [None]
        for position, token in enumerate(ids[1:]):
            kept = {*np.argsort(-values[position])[: asked["logprobs"]].tolist(), token}
            tops.append({names[i]: float(values[position, i]) for i in kept})
        own = [None, *(float(values[position, token]) for position, token in enumerate(ids[1:]))]
        return {"tokens": [names[i] for i in ids], "token_logprobs": own, "top_logprobs": tops}

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Not to the terminal."""


@pytest.fixture(scope="module")
def running() -> Iterator[Service]:
    if plugins.missing(("tokenizers",)):
        pytest.skip("tokenizers is not installed")
    service = Service()
    thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield service
    service.shutdown()
    service.server_close()


@pytest.fixture
def service(running: Service, monkeypatch: pytest.MonkeyPatch) -> Service:
    running.faults, running.seen, running.dies_after = [], [], 10**9
    running.faults_of = {}
    monkeypatch.setattr("edgekd.teachers.endpoint.FIRST_WAIT_S", 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return running


PROMPT = "{text} is it {labels} Answer :"
TEXTS = {"text": np.asarray(["buy cheap pills now", "hello friend", "write now"], object)}


def teacher(service: Service, folder: Path, model: str = "small", **told: Any) -> Teacher:
    told = {"prompt": PROMPT, "top": len(WORDS), **told}
    return load_teacher(f"openai:{service.url}#{model}", folder, {}, told, labels=("spam", "ham"))


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_the_teacher_says_what_the_model_says_of_the_words(service: Service, tmp_path: Path, api: str) -> None:
    answer = teacher(service, tmp_path, api=api).outputs(TEXTS)
    prompts = [f"{text} is it spam, ham Answer :" for text in TEXTS["text"]]
    expected = np.stack([service.log_probabilities(prompt)[[1, 2]] for prompt in prompts])

    np.testing.assert_allclose(answer.logits, expected, atol=1e-5)
    np.testing.assert_allclose(answer.features[UNNAMED], 1 - np.exp(expected).sum(1), atol=1e-5)
    np.testing.assert_array_equal(answer.features[BOUNDED], 0)
    assert sorted(asked["temperature"] for _, asked in service.seen) == [1, 1, 1]


def test_what_is_not_listed_is_a_bound_and_is_told() -> None:
    one = named_classes({" Spam": np.log(0.6), "spam.": np.log(0.1), "the": np.log(0.2)}, ("spam", "ham"))

    np.testing.assert_allclose(np.exp(one.log_probabilities), [0.7, 0.1], rtol=1e-6)  # 0.1 is missing to one
    assert one.unnamed == pytest.approx(0.3)
    assert one.bounded == pytest.approx(0.1 / 0.8)
    both = named_classes({"s": np.log(0.5), "h": np.log(0.3), "he": np.log(0.2)}, ("spam", "ham"))
    np.testing.assert_allclose(np.exp(both.log_probabilities), [0.5, 0.3], rtol=1e-6)
    assert named_classes({"the": np.log(0.9)}, ("spam", "ham")).bounded == 1
    # one token begins both words, and so names neither
    shared = named_classes({"sp": np.log(0.4), "spa": np.log(0.3), "spo": np.log(0.3)}, ("spam", "sport"))
    np.testing.assert_allclose(np.exp(shared.log_probabilities), [0.3, 0.3], rtol=1e-6)


def test_an_answer_that_names_no_class_is_a_line_about_the_prompt(service: Service, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"answers with .*, none of yes, no; mend the prompt"):
        teacher(service, tmp_path, words=["yes", "no"]).logits(TEXTS)
    for told, line in (
        ({"words": ["A"]}, "1 words for 2 labels"),
        ({"words": ["spam", "spammy"]}, "words 'spam' and 'spammy' begin alike"),
        ({"prompt": "what?"}, "the prompt has no {text}"),
    ):
        with pytest.raises(UsageError, match=line):
            teacher(service, tmp_path, **told)


def test_a_full_endpoint_is_asked_again_and_one_that_stays_so_is_told(service: Service, tmp_path: Path) -> None:
    service.faults = [(429, {"Retry-After": "0.01"}), (503, {}), (500, {})]
    assert teacher(service, tmp_path, parallel=1).logits(TEXTS).shape == (3, 2)
    assert len(service.seen) == 6
    service.faults = [(429, {})] * 9
    with pytest.raises(DataError, match=r"/v1/chat/completions gave no answer in 3 tries: 429 .*; what was captured"):
        teacher(service, tmp_path, parallel=1, retries=2).logits(TEXTS)
    assert len(service.seen) <= 10  # the other texts were not asked for


def test_what_asking_again_does_not_mend_is_told_at_once(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    service.faults = [(401, {})]
    with pytest.raises(UsageError, match=r"refuses: 401 .*you sent Bearer ….*; the key is read from MY_KEY") as told:
        teacher(service, tmp_path, parallel=1, key_variable="MY_KEY").logits(TEXTS)
    assert KEY not in str(told.value)
    service.faults = [(307, {"Location": f"{service.url}/chat/completions"})]
    with pytest.raises(UsageError, match="refuses: 307"):  # the key is not taken elsewhere
        teacher(service, tmp_path, parallel=1).logits(TEXTS)
    with pytest.raises(DataError, match=r"returned no log-probabilities for 'silent' \(chat\)"):
        teacher(service, tmp_path, model="silent").logits(TEXTS)


def test_a_refusal_is_told_while_another_prompt_waits(service: Service, tmp_path: Path) -> None:
    service.faults_of = {"cheap": (429, {"Retry-After": "60"}), "hello": (400, {})}
    with pytest.raises(UsageError, match="/v1/chat/completions refuses: 400"):
        teacher(service, tmp_path, parallel=2).logits(TEXTS)
    assert len(service.seen) <= 3  # the one that waited was not asked again


RECIPE = """
name = "asked"
labels = ["spam", "ham"]
[data]
train = "jsonl:train.jsonl"
validation = "jsonl:validation.jsonl"
test = "jsonl:test.jsonl"
text = { tokenizer = "tokenizer.json", max_length = 6 }
[teacher]
model = "openai:URL#small"
prompt = "{text} is it {labels} Answer :"
tokenizer = "tokenizer.json"
top = 12
retries = 0
parallel = 1
[student]
model = "mine:student"
"""


def test_a_capture_that_breaks_off_goes_on_without_asking_twice(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekd.origins.openai.PER_SHARD", 4)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    service.tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "mine.py").write_text("def student(): ...")
    (tmp_path / "edgekd.toml").write_text(RECIPE.replace("URL", service.url))
    texts = [f"{a} {b} {c}" for a in WORDS[1:5] for b in WORDS[5:8] for c in WORDS[8:12]]
    for name, some in (("train", texts[:18]), ("validation", texts[18:22]), ("test", texts[22:28])):
        rows = [{"text": text, "label": "spam" if "cheap" in text else "ham"} for text in some]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    progress = progress_for()

    service.dies_after = 10
    with pytest.raises(DataError, match="500"):
        capture_stage(Workspace(load_recipe(tmp_path / "edgekd.toml")), progress)
    assert len(service.seen) == 11  # two shards of four, and two of the third, are answered; then it died
    service.seen, service.dies_after = [], 10**9
    work = Workspace(load_recipe(tmp_path / "edgekd.toml"))
    capture_stage(work, progress)
    cache, train = work.cache("train"), work.splits.train

    assert len(service.seen) == 10 + 4 + 6
    assert {key for key, _ in service.seen} == {f"Bearer {KEY}"}
    expected = teacher(service, tmp_path, top=12, tokenizer="tokenizer.json").outputs(train.arrays())
    np.testing.assert_allclose(softmax(cache.logits(train.ids)), softmax(expected.logits), atol=1e-3)
    told = cache.manifest["beside"]
    assert told[UNNAMED]["mean"] == pytest.approx(expected.features[UNNAMED].mean(), abs=1e-3)
    assert told[BOUNDED]["largest"] == pytest.approx(expected.features[BOUNDED].max(), abs=1e-3)
    assert cache.manifest["teacher"][1].endswith("#small: its top 12 log-probabilities, T = 1")
    assert teacher_sentences(work, 0.5)[0].startswith(f"Of what the teacher says of the training views, {UNNAMED}: ")
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10
    assert not any(KEY.encode() in content for content in written)


WINDOWS = """
name = "windows"
[data]
train = "text:train.txt"
validation = "text:validation.txt"
test = "text:test.txt"
tokens = { tokenizer = "tokenizer.json", length = 8 }
[teacher]
model = "openai:URL#small"
api = "tokens"
tokenizer = "tokenizer.json"
top = 4
[student]
model = "mine:student"
[distill]
arms = ["kd"]
temperature = 1.0
"""


def windows(service: Service, folder: Path, recipe: str = WINDOWS) -> Workspace:
    service.tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "mine.py").write_text("def student(): ...")
    (folder / "edgekd.toml").write_text(recipe.replace("URL", service.url))
    for seed, name in enumerate(("train", "validation", "test")):
        words = np.random.default_rng(seed).choice(WORDS[1:12], 44)
        (folder / f"{name}.txt").write_text(" ".join(words))
    return Workspace(load_recipe(folder / "edgekd.toml"))


def test_a_language_models_tokens_are_kept_as_far_as_the_endpoint_lists_them(service: Service, tmp_path: Path) -> None:
    work = windows(service, tmp_path)
    capture_stage(work, progress_for())
    cache, train = work.cache("train"), work.splits.train
    assert train.labels is not None
    counted = train.labels >= 0
    with torch.no_grad():
        logits = service.model(torch.from_numpy(train.arrays()["input_ids"]).long()).numpy()[counted]
    rows, labels = cache.rows(train.ids), torch.from_numpy(train.labels[counted])
    targets = cache.read(rows, np.zeros(len(train), np.int64), counted).outputs.classes
    student = torch.randn(len(logits), len(WORDS), generator=torch.Generator().manual_seed(0))
    top = codec_of("top4")
    exact = np.zeros(len(logits), top.fields(len(WORDS)))
    top.encode(logits - logits.max(axis=1, keepdims=True), exact)
    losses = [soft_target_kl(*some.paired(student, labels, 1.0)) for some in (targets, top.decode(exact))]

    assert cache.codec.name == "listed4"
    assert float(losses[0]) == pytest.approx(float(losses[1]), abs=1e-3)
    whole = softmax(logits)
    told = cache.label_log_probabilities(rows, np.zeros(len(train), np.int64), counted)
    listed = np.sort(whole, axis=1)[:, -4:].sum(axis=1)
    known = counted.copy()
    known[range(len(train)), counted.sum(axis=1) - 1] = False  # what follows a window the endpoint has not read
    np.testing.assert_allclose(
        told[known[counted]], np.log(whole[range(len(whole)), labels])[known[counted]], atol=2e-3
    )
    assert 0 < cache.manifest["beside"][UNLISTED]["mean"] <= 1 - listed.mean() + 1e-3
    with pytest.raises(UsageError, match="knows the mass outside its top classes at T = 1, not at T = 2"):
        targets.paired(student, labels, 2.0)
    with pytest.raises(UsageError, match=r"gives its 4 largest log-probabilities at T = 1, and kd has T = 2; temp"):
        capture_stage(windows(service, tmp_path, WINDOWS.replace("1.0", "2.0")), progress_for())


def test_tokens_without_ids_are_not_guessed_from_their_text(service: Service, tmp_path: Path) -> None:
    work = windows(service, tmp_path, WINDOWS.replace("#small", "#old"))

    with pytest.raises(DataError, match=r"returned tokens as text, as '.*', of which no ids are known"):
        work.teacher.logits(work.splits.test.arrays())
    short = windows(service, tmp_path, WINDOWS.replace("top = 4", "top = 4\nvocabulary = 5"))
    with pytest.raises(DataError, match=r"the endpoint lists token \d+, and the vocabulary has 5; say vocabulary"):
        short.teacher.logits(short.splits.test.arrays())
