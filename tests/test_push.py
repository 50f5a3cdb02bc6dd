"""Pushes over real HTTP to a Hub on this machine, with huggingface_hub as it is, and what others load from there."""

import hashlib
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from dense_helpers import save_segmenter
from loopback_hub import HANG_UP, Account, LoopbackHub, card_errors
from PIL import Image
from references import TINY, TINY_SWIN
from runs import ROOT, flags, pretrain
from transformers import ViTImageProcessor

from mimae import (
    MIMAEConfig,
    MIMAEForImageClassification,
    MISimMIMConfig,
    MISimMIMForImageClassification,
    MISimMIMForPreTraining,
)
from mimae.hub.model_card import write_classification_card, write_dense_card, write_model_card

WRITE, READ, UNKNOWN = (f"hf_{name * 6}" for name in ("Writer", "Reader", "Nobody"))
FAST = [0.01, 0.01]  # waits: two further attempts
SHARED_CODE = {"configuration_mim.py", "modeling_mim.py", "masking.py", "mutual_information.py"}
CODE = SHARED_CODE | {"configuration_mimae.py", "modeling_mimae.py"}
SWIN_CODE = SHARED_CODE | {"configuration_misimmim.py", "modeling_misimmim.py"}
MODEL = {"config.json", "model.safetensors", "preprocessor_config.json"}

# huggingface_hub reads its environment when it is imported: a process of its own, which calls what it is asked to
CLIENT = """
import contextlib, dataclasses, io, json, sys

import torch

from mimae.hub import push

torch.set_num_threads(1)
for line in sys.stdin:
    name, arguments, options = json.loads(line)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            result = getattr(push, name)(*arguments, **options)
            answer = {"result": dataclasses.asdict(result) if dataclasses.is_dataclass(result) else result}
        except Exception as error:
            answer = {"raised": type(error).__name__, "message": str(error)}
    print(json.dumps(answer | {"printed": printed.getvalue()}), flush=True)
"""


class Client:
    """`mimae.hub.push` in a process of its own, whose Hub is the one given; everything that it says is kept."""

    def __init__(self, environment: dict[str, str], log: Path):
        self.log, self.answers = log, []
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )

    def call(self, name: str, *arguments, **options) -> dict:
        self.process.stdin.write(json.dumps([name, [str(argument) for argument in arguments], options]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        self.answers.append(line)
        return json.loads(line)

    def push(self, *arguments, **options) -> dict:
        return self.call("push_checkpoint", *arguments, **({"backbone": "none", "retry_waits": FAST} | options))[
            "result"
        ]


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub({WRITE: Account("someone"), READ: Account("reader", may_write=False)}) as hub:
        yield hub


@pytest.fixture(autouse=True)
def healthy(hub):
    hub.heal()
    hub.requests.clear()


@pytest.fixture(scope="module")
def environment(hub, tmp_path_factory) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return inherited | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "HF_TOKEN": WRITE,
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def client(environment, tmp_path_factory):
    client = Client(environment, tmp_path_factory.mktemp("client") / "log.txt")
    yield client
    client.process.stdin.close()
    client.process.wait(timeout=60)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a real run, with what people and programs leave in such folders beside it."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", WRITE)
        assert pretrain(folder, max_train_steps=4, checkpointing_steps=2, report_to="tensorboard") == 0
    (folder / "notes.txt").write_text("not for others")
    (folder / "train.py").write_text("import mimae")
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / "holiday.png").write_bytes(b"a picture that no card shows")
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    """A classifier with its card, as a run leaves them."""
    folder = tmp_path_factory.mktemp("classifier")
    config = MIMAEConfig(**TINY, num_labels=3, id2label={0: "cat", 1: "dog", 2: "eel"})
    MIMAEForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    results = {
        "task": "finetune",
        "dataset": "three animals",
        "metrics": {"accuracy": 0.5},
        "recipe": {"train_dir": "/home/someone/animals", "hub_token": UNKNOWN, "learning_rate": 1.0e-3},
    }
    (folder / "results.json").write_text(json.dumps(results))
    write_classification_card(folder, results=results, pictures=[])
    return folder


@pytest.fixture(scope="module")
def swin(tmp_path_factory) -> Path:
    """A pre-trained Swin with its card, as a run leaves them."""
    folder = tmp_path_factory.mktemp("swin")
    MISimMIMForPreTraining(MISimMIMConfig(**TINY_SWIN, num_channels=1)).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    ViTImageProcessor(size=size, image_mean=[0.5], image_std=[0.5]).save_pretrained(folder)
    write_model_card(folder, summary={"model_type": "misimmim"}, recipe={"model_type": "misimmim"}, pictures=[])
    return folder


@pytest.fixture(scope="module")
def swin_classifier(tmp_path_factory) -> Path:
    """A Swin with a classifier, likewise."""
    folder = tmp_path_factory.mktemp("swin_classifier")
    config = MISimMIMConfig(**TINY_SWIN, num_labels=3, id2label={0: "cat", 1: "dog", 2: "eel"})
    MISimMIMForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    write_classification_card(folder, results={"task": "finetune"}, pictures=[])
    return folder


def digest(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def calls(hub: LoopbackHub, path_contains: str) -> list[int]:
    """The statuses of the requests to such paths."""
    return [request.status for request in hub.requests if path_contains in request.path]


# --- what goes along -------------------------------------------------------------------------------------------------


def test_a_push_takes_what_is_listed_and_nothing_else(client, hub, run):
    report = client.push(run, "someone/listed")
    assert report == {
        "repo_id": "someone/listed",
        "url": f"{hub.endpoint}/someone/listed",
        "backbone_url": None,
        "note": None,
        "error": None,
    }
    pushed = hub.files("someone/listed")
    documents = {"README.md", "metrics.jsonl", "results.json", "curves.png", "reconstructions.png"}
    assert pushed.keys() == MODEL | CODE | documents | {".gitattributes"}
    for name in pushed.keys() - {".gitattributes", "README.md", "results.json"}:
        assert pushed[name] == (run / name).read_bytes(), name
    assert {"checkpoint-4", "tensorboard", "notes.txt", "train.py", "optimizer.pt", "holiday.png"} <= {
        path.name for path in run.iterdir()
    }


def test_the_card_names_the_repository_that_it_lies_in(client, hub, run):
    client.push(run, "someone/named")
    local, pushed = (run / "README.md").read_text(), hub.files("someone/named")["README.md"].decode()
    assert pushed == local.replace("REPOSITORY_OR_FOLDER_OF_THIS_CARD", "someone/named")
    assert 'checkpoint = "someone/named"' in pushed
    assert not list(card_errors(pushed))


def test_a_swin_takes_its_own_code_along(client, hub, swin):
    assert client.push(swin, "someone/swin-code")["error"] is None
    assert hub.files("someone/swin-code").keys() == MODEL | SWIN_CODE | {"README.md", ".gitattributes"}


def test_results_go_without_paths_and_tokens(client, hub, classifier):
    client.push(classifier, "someone/results")
    pushed = json.loads(hub.files("someone/results")["results.json"])
    assert pushed["metrics"] == {"accuracy": 0.5}
    assert pushed["recipe"] == {"learning_rate": 1.0e-3}


def test_a_checkpoint_of_a_run_can_be_pushed_without_its_training_state(client, hub, run):
    assert client.push(run / "checkpoint-4", "someone/checkpoint")["error"] is None
    assert hub.files("someone/checkpoint").keys() == MODEL | CODE | {".gitattributes"}
    assert "has no README.md" in client.log.read_text()


def test_a_name_without_an_owner_is_the_users_own(client, hub, run):
    assert client.push(run, "ownerless")["repo_id"] == "someone/ownerless"
    assert b'checkpoint = "someone/ownerless"' in hub.files("someone/ownerless")["README.md"]


def test_a_second_push_adds_one_commit_and_none_if_nothing_changed(client, hub, run, tmp_path):
    assert client.push(run, "someone/again", commit_message="First")["error"] is None
    assert client.push(run, "someone/again", commit_message="The same")["error"] is None
    assert hub.repositories["someone/again"].messages == ["initial commit", "First"]
    other = tmp_path / "other"
    other.mkdir()
    for name in MODEL | CODE:
        (other / name).write_bytes((run / name).read_bytes())
    (other / "metrics.jsonl").write_text('{"step": 1}\n')
    assert client.push(other, "someone/again", commit_message="Second")["error"] is None
    assert hub.repositories["someone/again"].messages == ["initial commit", "First", "Second"]
    assert hub.files("someone/again")["metrics.jsonl"] == b'{"step": 1}\n'
    assert "README.md" in hub.files("someone/again")


def test_private_means_private(client, hub, run):
    client.push(run, "someone/secret", private=True)
    assert hub.repositories["someone/secret"].private
    client.push(run, "someone/open")
    assert not hub.repositories["someone/open"].private


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("config.json", "is no model's folder: it has no config.json"),
        ("model.safetensors", "is no model's folder: it has no model*.safetensors"),
        ("modeling_mimae.py", "names code in modeling_mimae.py"),
    ],
)
def test_a_folder_that_is_no_whole_model_is_refused(client, hub, run, tmp_path, missing, words):
    for name in MODEL | CODE - {missing}:
        if name != missing:
            (tmp_path / name).write_bytes((run / name).read_bytes())
    report = client.push(tmp_path, f"someone/no-{missing}")
    assert words in report["error"]
    assert report["url"] is None
    assert f"someone/no-{missing}" not in hub.repositories


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repo_id", "token", "words"),
    [
        ("someone/refused", UNKNOWN, "does not know the access token, or there is none: `hf auth login`"),
        ("reader/refused", READ, "may not write there: `hf auth login` with one that may"),
        ("others/refused", WRITE, "may not write there"),
        ("others/there", WRITE, "may not write there"),
    ],
)
def test_a_refusal_is_told_at_once_in_one_line(client, hub, run, repo_id, token, words):
    if repo_id == "others/there":
        hub.add_repository(repo_id)
    before = digest(run)
    report = client.push(run, repo_id, token=token)
    assert report["error"].startswith(f"{repo_id}: ")
    assert words in report["error"]
    assert "\n" not in report["error"]
    assert report["url"] is None
    assert len(calls(hub, "repos/create")) == 1  # not tried again
    assert repo_id not in hub.repositories or hub.files(repo_id).keys() == {".gitattributes"}
    assert digest(run) == before


@pytest.mark.parametrize("status", [429, 503, HANG_UP])
@pytest.mark.parametrize(("number", "step"), [*enumerate(["repos/create", "validate-yaml", "/commit/"])])
def test_a_failure_that_passes_costs_nothing_but_time(client, hub, run, status, number, step):
    repo_id = f"someone/passing-{status}-{number}"
    hub.fail_next(status, path_contains=step)
    assert client.push(run, repo_id)["error"] is None
    assert calls(hub, step)[0] == status
    assert calls(hub, step)[1] == 200
    assert hub.repositories[repo_id].messages == ["initial commit", "Upload model"]


def test_what_huggingface_hub_repeats_itself_is_not_repeated_again(client, hub, run):
    log = client.log.stat().st_size
    hub.fail_next(503, times=100, path_contains="/preupload/", Retry_After="0")
    assert "503" in client.push(run, "someone/theirs")["error"]
    assert len(calls(hub, "/preupload/")) > 1
    assert b"trying again" not in client.log.read_bytes()[log:]


def test_the_pause_that_the_hub_asks_for_is_kept(client, hub, run):
    hub.fail_next(429, path_contains="/commit/", Retry_After="1")
    assert client.push(run, "someone/patient")["error"] is None
    assert "trying again in 1 s" in client.log.read_text()


def test_a_pause_of_an_hour_is_not_waited_for(client, hub, run):
    hub.fail_next(429, path_contains="/commit/", Retry_After="3600")
    assert "429" in client.push(run, "someone/impatient")["error"]
    assert calls(hub, "/commit/") == [429]


@pytest.mark.parametrize("status", [503, HANG_UP])
def test_a_failure_that_stays_is_reported_and_the_push_can_be_made_up_for(client, hub, run, status):
    repo_id = f"someone/down-{status}"
    before = digest(run)
    hub.fail_next(status, times=1000, path_contains="/commit/")
    report = client.push(run, repo_id)
    assert report["error"].startswith(f"{repo_id}: the Hub did not answer as it should (")
    assert "\n" not in report["error"]
    assert calls(hub, "/commit/") == [status] * (len(FAST) + 1)
    assert hub.repositories[repo_id].messages == ["initial commit"]
    assert digest(run) == before

    hub.heal()
    assert client.push(run, repo_id)["error"] is None
    assert hub.repositories[repo_id].messages == ["initial commit", "Upload model"]


# --- before a run ----------------------------------------------------------------------------------------------------


def test_access_is_checked_before_a_run_and_the_repository_made(client, hub):
    assert client.call("check_access", "early", private=True)["result"] == "someone/early"
    assert hub.repositories["someone/early"].private
    assert client.call("check_access", "someone/early")["result"] == "someone/early"


@pytest.mark.parametrize(
    ("repo_id", "token"),
    [
        ("someone/x", UNKNOWN),
        ("reader/x", READ),
        ("others/x", WRITE),
        ("others/public", WRITE),
        ("others/public", READ),
    ],
)
def test_a_token_that_may_not_write_is_refused_before_a_run(client, hub, repo_id, token):
    # of a public repository that exists, `create_repo(exist_ok=True)` alone says nothing
    hub.add_repository("others/public")
    answer = client.call("check_access", repo_id, token=token)
    assert answer["raised"] == "PermissionError"
    assert answer["message"].startswith(f"{repo_id}: ")
    assert repo_id == "others/public" or repo_id not in hub.repositories


@pytest.mark.parametrize("status", [503, HANG_UP])
def test_a_hub_out_of_reach_before_a_run_is_only_warned_about(client, hub, status):
    hub.fail_next(status, times=1000)
    assert client.call("check_access", f"someone/later-{status}")["result"] == f"someone/later-{status}"
    assert "whether the result can be pushed is not known: someone/later" in client.log.read_text()


def test_a_bad_name_is_refused_before_a_run(client):
    assert client.call("check_access", "some/thing/else")["raised"] == "HFValidationError"


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "README.md", "metrics.jsonl", "results.json"])
def test_a_file_with_a_token_is_not_pushed(client, hub, run, tmp_path, name):
    for path in MODEL | CODE | {"README.md"}:
        (tmp_path / path).write_bytes((run / path).read_bytes())
    planted = json.loads((tmp_path / name).read_text()) if name == "config.json" else {}
    repo_id = f"someone/planted-{name.split('.')[0]}"
    if name == "README.md":
        (tmp_path / name).write_text((run / name).read_text() + WRITE)
    else:
        (tmp_path / name).write_text(json.dumps(planted | {"note": f"with {WRITE}"}))
    report = client.push(tmp_path, repo_id)
    if name == "results.json":  # goes in its public form
        assert json.loads(hub.files(repo_id)[name]) == {}
    else:
        assert f"{name} holds what looks like an access token" in report["error"]
        assert repo_id not in hub.repositories


def test_no_token_is_written_or_said(client, hub, environment, run, classifier):
    answers, log = len(client.answers), client.log.stat().st_size
    hub.fail_next(503, path_contains="/commit/")
    assert client.push(classifier, "someone/quiet")["error"] is None
    assert client.push(run, "someone/quiet", token=UNKNOWN)["error"]
    assert client.push(run, "reader/quiet", token=READ)["error"]
    hub.fail_next(HANG_UP, times=100, path_contains="/commit/")
    assert client.push(run, "someone/quiet")["error"]
    assert client.call("check_access", "others/quiet", token=READ)["raised"]
    written = [*run.rglob("*"), *Path(environment["HF_HOME"]).rglob("*"), classifier / "README.md"]
    places = {str(path): path.read_bytes() for path in written if path.is_file()}
    places |= {f"hub/{name}": content for name, content in hub.files("someone/quiet").items()}
    places["answers"] = "".join(client.answers[answers:]).encode()
    places["log"] = client.log.read_bytes()[log:]
    places["requests"] = repr(hub.requests).encode()
    assert b"trying again" in places["log"]
    assert UNKNOWN in (classifier / "results.json").read_text()  # one that could have got out
    for token in (WRITE, READ, UNKNOWN):
        assert not [place for place, content in places.items() if token.encode() in content]


def test_a_token_among_the_flags_or_in_a_recipe_is_refused_unsaid(tmp_path, capfd):
    # huggingface_hub has a place of its own for it
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(f"hub_token: {WRITE}\n")
    for extra in (["--hub_token", WRITE], [f"--hub_token={WRITE}"], ["--config", str(recipe)]):
        with pytest.raises(ValueError, match=r"unknown .*hub_token") as refusal:
            pretrain(folder, *extra)
        assert WRITE not in str(refusal.value)
    assert not folder.exists()
    assert WRITE not in "".join(capfd.readouterr())


def test_a_token_in_a_name_is_not_repeated(client):
    report = client.push("nowhere", f"{WRITE}/x y")
    assert "hf_…" in report["error"]
    assert WRITE not in report["error"]


# --- for others ------------------------------------------------------------------------------------------------------


def test_the_encoder_can_be_a_branch_of_its_own(client, hub, run):
    def push():
        report = client.push(run, "someone/branched", backbone="revision", backbone_revision="stock")
        assert report["error"] is None
        assert report["backbone_url"] == f"{hub.endpoint}/someone/branched/tree/stock"
        return hub.files("someone/branched", "stock")

    stock = push()
    assert stock.keys() == MODEL | {"README.md", ".gitattributes"}
    config = json.loads(stock["config.json"])
    assert config["model_type"] == "vit"
    assert "auto_map" not in config
    assert b'from_pretrained(checkpoint, revision="stock"' in stock["README.md"]
    assert not list(card_errors(stock["README.md"].decode()))
    assert hub.files("someone/branched").keys() >= CODE
    messages = list(hub.repositories["someone/branched"].messages)
    assert push() == stock
    assert hub.repositories["someone/branched"].messages == messages


def test_the_encoder_cannot_take_the_place_of_the_model(client, hub, run):
    report = client.push(run, "someone/main", backbone="revision", backbone_revision="main")
    assert "cannot be main" in report["error"]
    assert "someone/main" not in hub.repositories


def test_a_model_without_a_stock_encoder_goes_without_it_and_says_so(client, hub, classifier):
    report = client.push(classifier, "someone/alone", backbone="repo")
    assert report["note"].startswith("no backbone: ")
    assert (report["error"], report["backbone_url"]) == (None, None)
    assert "someone/alone-backbone" not in hub.repositories


def test_a_dense_model_is_pushed_with_its_card_and_no_encoder_beside_it(client, hub, tmp_path):
    save_segmenter(tmp_path)
    results = {"task": "segmentation", "metrics": {"mean_iou": 0.5}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    write_dense_card(tmp_path, results=results, pictures=[])
    report = client.push(tmp_path, "someone/segmenter", backbone="repo")
    assert (report["error"], report["backbone_url"]) == (None, None)
    assert report["note"].startswith("no backbone: ")
    files = hub.files("someone/segmenter")
    assert files.keys() - {".gitattributes"} == MODEL | {"README.md", "results.json"}
    assert 'checkpoint = "someone/segmenter"' in files["README.md"].decode()
    assert not list(card_errors(files["README.md"].decode()))
    assert "someone/segmenter-backbone" not in hub.repositories


def test_an_encoder_that_does_not_get_through_leaves_the_model_there(client, hub, run):
    hub.fail_next(503, times=100, path_contains="/half-backbone/commit/")
    report = client.push(run, "someone/half", backbone="repo")
    assert report["url"] == f"{hub.endpoint}/someone/half"
    assert report["error"].startswith("someone/half-backbone: the Hub did not answer")
    assert hub.files("someone/half").keys() >= CODE


WITHOUT_THE_PACKAGE = """
import json, re, sys

sys.modules["mimae"] = None  # an editable install must not help
import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from transformers import AutoModelForPreTraining

torch.set_num_threads(1)
image = Image.open("image.png")
for repo_id, revision in json.loads(sys.argv[1]):
    card = open(hf_hub_download(repo_id, "README.md", revision=revision)).read()
    snippets = re.findall(r"```python\\n(.*?)```", card, flags=re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(snippet, names := {"image": image})
    print(repo_id, type(names.get("model") or names["classify"].model).__name__)
    name = repo_id.split("/")[1]
    if "output" in names:
        torch.save(names["output"].pooler_output, f"{name}.pt")
    if "tokens" in names:
        assert type(names["model"]).__module__.startswith("transformers.models.")
        torch.save(names["tokens"], f"{name}.pt")
    if "classify" in names:
        print(sorted(answer["label"] for answer in names["classify"](image)))
for repo_id in ("someone/digits", "someone/swin"):
    model = AutoModelForPreTraining.from_pretrained(repo_id, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert model(torch.zeros(1, model.config.num_channels, 16, 16)).loss.isfinite()
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """A folder with an image, and nothing of this package in sight."""
    folder = tmp_path_factory.mktemp("elsewhere")
    Image.effect_noise((20, 20), 64).save(folder / "image.png")
    return folder


def test_what_was_pushed_works_as_its_cards_say_without_this_package(
    client, hub, environment, run, classifier, swin, swin_classifier, elsewhere
):
    answer = client.call("main", argv=[str(run), "someone/digits"])
    assert answer["result"] == 0, answer
    assert answer["printed"].splitlines() == [
        f"pushed     {hub.endpoint}/someone/digits",
        f"backbone   {hub.endpoint}/someone/digits-backbone",
    ]
    assert client.push(classifier, "someone/animals")["error"] is None
    assert client.push(run, "someone/both", backbone="revision")["error"] is None
    for folder, repo_id in ((swin, "someone/swin"), (swin_classifier, "someone/swin-animals")):
        report = client.push(folder, repo_id, backbone="repo")
        assert (report["error"], report["note"]) == (None, None)
        assert not list(card_errors(hub.files(f"{repo_id}-backbone")["README.md"].decode()))

    repositories = ["someone/digits", "someone/digits-backbone", "someone/animals", ("someone/both", "backbone")]
    repositories += ["someone/swin", "someone/swin-backbone", "someone/swin-animals"]
    repositories = [name if isinstance(name, tuple) else (name, None) for name in repositories]
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, json.dumps(repositories)]
    clean = {name: value for name, value in environment.items() if name not in ("PYTHONPATH", "HF_TOKEN")}
    clean |= {"HF_HOME": str(elsewhere / "home"), "HF_MODULES_CACHE": str(elsewhere / "home" / "modules")}
    result = subprocess.run(command, cwd=elsewhere, env=clean, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "someone/digits MIMAEModel",
        "someone/digits-backbone ViTModel",
        "someone/animals MIMAEForImageClassification",
        "['cat', 'dog', 'eel']",
        "someone/both ViTModel",
        "someone/swin MISimMIMModel",
        "someone/swin-backbone SwinModel",
        "someone/swin-animals MISimMIMForImageClassification",
        "['cat', 'dog', 'eel']",
    ]
    found = {path.stem: torch.load(path, weights_only=True) for path in elsewhere.glob("*.pt")}
    for tokens, features in (
        (found["digits-backbone"][:, 1:], found["digits"]),
        (found["both"][:, 1:], found["digits"]),
        (found["swin-backbone"], found["swin"]),
    ):
        torch.testing.assert_close(tokens.mean(dim=1), features, rtol=1e-5, atol=1e-5)


def test_the_command_fails_where_the_push_does(client, run):
    answer = client.call("main", argv=[str(run), "others/digits", "--backbone", "none"])
    assert answer["result"] == 1
    assert answer["printed"].startswith("NOT PUSHED others/digits: the access token may not write there")
    assert len(answer["printed"].splitlines()) == 1


def test_this_hub_runs_on_its_own():
    script = Path(__file__).parent / "loopback_hub.py"
    command = [sys.executable, str(script), "--token", WRITE, "--user", "me"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        request = urllib.request.Request(line.split("HF_ENDPOINT=")[1].strip() + "/api/whoami-v2")
        request.add_header("Authorization", f"Bearer {WRITE}")
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as response:
            assert json.load(response)["name"] == "me"
        process.terminate()
    assert WRITE not in line


@pytest.mark.parametrize("status", [pytest.param(None, marks=pytest.mark.extended), 400])
def test_pre_training_pushes_at_its_end_and_a_failure_costs_the_exit_code_alone(hub, environment, tmp_path, status):
    repo_id = f"someone/fresh-{status}"
    if status is not None:
        hub.fail_next(status, times=100, path_contains="/commit/")
    argv = flags(tmp_path / "run", max_train_steps=2, probe_samples=0)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    command = [*launcher, str(ROOT / "run_mim_pretrain.py"), *argv, "--push_to_hub", "--hub_model_id", repo_id]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == (0 if status is None else 1), result.stderr[-3000:]
    assert WRITE not in result.stdout + result.stderr
    for name in MODEL | CODE | {"README.md"}:
        assert (tmp_path / "run" / name).exists(), name
    if status is None:
        assert hub.files(repo_id).keys() >= MODEL | CODE | {"README.md", "curves.png"}
        assert hub.files(f"{repo_id}-backbone").keys() >= {"config.json", "model.safetensors", "README.md"}
    else:
        assert f"NOT PUSHED {repo_id}" in result.stdout
        assert f"python -m mimae.hub.push {tmp_path / 'run'} {repo_id}" in result.stdout
