"""Publishing with the real client, over HTTP, against a Hub on loopback."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from hub_client import hub_for_this_process
from hub_server import Account, Hub, StoredFile, running_hub
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from corda_convert.errors import InputNotFound, PublishFailed
from corda_convert.hub import Destination, check_access, push_folder, translated_errors

# The client's own way of handing a file to its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "alice/merged"
CARD = "---\nlibrary_name: peft\ntags:\n- corda\n---\n\n# Merged\n"
WEIGHTS = hashlib.shake_256(b"weights").digest(3 * 1024 * 1024)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running Hub, with the client of this process configured as `Hub.environment` configures that of a child."""
    with hub_for_this_process(tmp_path / "home", monkeypatch) as server:
        yield server


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=hub.token)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a conversion leaves behind, with hidden files that are nobody's business."""
    contents = {
        "README.md": CARD.encode(),
        "config.json": b'{"model_type": "llama"}\n',
        "empty.txt": b"",
        "model-00001-of-00002.safetensors": WEIGHTS,
        "model-00002-of-00002.safetensors": WEIGHTS[::-1],
        "model.safetensors.index.json": b'{"weight_map": {}}\n',
        "tokenizer/vocabulary, é.txt": "ü\n".encode(),
        "corda_init/adapter_model.safetensors": WEIGHTS[:1000],
        ".cache/huggingface/x.lock": b"no",
        ".hidden": b"no",
    }
    out = tmp_path / "the output"
    for name, content in contents.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    return out


def shown_files(folder: Path) -> dict[str, bytes]:
    names = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {n.as_posix(): p.read_bytes() for n, p in names.items() if not any(x.startswith(".") for x in n.parts)}


def push(folder: Path, api: HfApi, *, repo_id: str = REPO, **options):
    return push_folder(folder, Destination(repo_id, message="Publish the merged model", **options), api=api)


def test_one_commit_holds_the_whole_folder(hub: Hub, api: HfApi, folder: Path, tmp_path: Path) -> None:
    published = push(folder, api)

    expected = shown_files(folder)
    repository = hub.repositories[REPO]
    assert repository.files() == expected
    assert [(made.oid, made.title) for made in repository.history()] == [(published.commit, "Publish the merged model")]
    assert published.repo_id == REPO
    assert published.url == f"{hub.endpoint}/{REPO}"
    assert (published.files, published.total_bytes) == (len(expected), sum(map(len, expected.values())))
    stored = repository.resolve("main").files
    assert {name for name, file in stored.items() if file.lfs} == {n for n in expected if n.endswith(".safetensors")}
    assert len(hub.requests_to("/lfs-storage/", "PUT")) == 3
    assert not repository.private

    local = tmp_path / "downloaded"
    huggingface_hub.snapshot_download(REPO, local_dir=local, endpoint=hub.endpoint, token=hub.token)
    assert {n: c for n, c in shown_files(local).items() if n != ".gitattributes"} == expected


def test_the_same_folder_again_is_no_new_commit(hub: Hub, api: HfApi, folder: Path) -> None:
    first = push(folder, api)
    uploads = len(hub.requests_to("/lfs-storage/"))
    assert push(folder, api) == replace(first, is_new=False)
    assert len(hub.requests_to("/lfs-storage/")) == uploads
    assert len(hub.repositories[REPO].history()) == 1


def test_a_changed_folder_is_a_second_commit_and_other_files_stay(hub: Hub, api: HfApi, folder: Path) -> None:
    push(folder, api)
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="LICENSE", repo_id=REPO)
    (folder / "config.json").write_bytes(b"{}\n")
    push(folder, api)
    assert hub.repositories[REPO].files() == {**shown_files(folder), "LICENSE": b"mine"}


def test_other_weights_in_the_repository_are_refused(hub: Hub, api: HfApi, folder: Path) -> None:
    push(folder, api)
    (folder / "model-00002-of-00002.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(PublishFailed, match=r"model-00002-of-00002\.safetensors"):
        push(folder, api)
    assert len(hub.repositories[REPO].history()) == 1


def test_private_is_private(hub: Hub, api: HfApi, folder: Path) -> None:
    push(folder, api, private=True)
    assert hub.repositories[REPO].private
    stranger = HfApi(endpoint=hub.endpoint, token=hub.add_account(Account("bob")))
    with pytest.raises(HfHubHTTPError) as caught:
        stranger.list_repo_files(REPO)
    assert caught.value.response.status_code == 404
    push(folder, api, private=True)


def test_private_into_a_public_repository_is_refused_before_uploading(hub: Hub, api: HfApi, folder: Path) -> None:
    hub.add_repository(REPO)
    for attempt in (
        lambda: push(folder, api, private=True),
        lambda: check_access(Destination(REPO, private=True), api=api),
    ):
        with pytest.raises(PublishFailed, match="exists and is public"):
            attempt()
    assert not hub.requests_to("preupload")
    assert hub.repositories[REPO].files() == {}


def test_an_organisation_of_the_account(hub: Hub, api: HfApi, folder: Path) -> None:
    check_access(Destination("wonderland/merged"), api=api)
    push(folder, api, repo_id="wonderland/merged")
    assert hub.repositories["wonderland/merged"].files() == shown_files(folder)


@pytest.mark.parametrize(
    "token",
    ["hf_thisTokenIsNotKnownToTheServer", "unusual-secret", None],
    ids=["wrong", "wrong and of another form", "none"],
)
def test_without_a_good_token(hub: Hub, folder: Path, token: str | None) -> None:
    api = HfApi(endpoint=hub.endpoint, token=token)
    for attempt in (lambda: push(folder, api), lambda: check_access(Destination(REPO), api=api)):
        with pytest.raises(PublishFailed) as caught:
            attempt()
        assert caught.value.why
        assert "hf auth login" in str(caught.value.next_step)
        assert token is None or token not in str(caught.value)
    assert hub.repositories == {}


def test_not_logged_in(hub: Hub) -> None:
    with pytest.raises(PublishFailed, match="hf auth login"):
        check_access(Destination(REPO))
    assert hub.requests == []


def test_check_access_asks_little_and_changes_nothing(hub: Hub, api: HfApi) -> None:
    check_access(Destination(REPO, private=True), api=api)
    assert {request.method for request in hub.requests} == {"GET"}
    assert hub.repositories == {}


@pytest.mark.parametrize("repo_id", ["merged", "a/b/c", "alice/me--rged", "", "alice/merged.git", "./out", "alice/é"])
def test_what_is_not_a_repository_name(hub: Hub, api: HfApi, folder: Path, repo_id: str) -> None:
    for attempt in (lambda: push(folder, api, repo_id=repo_id), lambda: check_access(Destination(repo_id), api=api)):
        with pytest.raises(PublishFailed, match="NAMESPACE/NAME"):
            attempt()
    assert hub.requests == []


def test_the_namespace_of_somebody_else(hub: Hub, api: HfApi, folder: Path) -> None:
    with pytest.raises(PublishFailed, match="neither the account nor one of its organisations: alice, wonderland"):
        check_access(Destination("bob/merged"), api=api)
    with pytest.raises(PublishFailed, match="403"):
        push(folder, api, repo_id="bob/merged")
    hub.add_repository("bob/public")
    with pytest.raises(PublishFailed, match="may write to this namespace"):
        push(folder, api, repo_id="bob/public")
    hub.add_repository("bob/gated").gated = True
    with pytest.raises(PublishFailed):
        push(folder, api, repo_id="bob/gated")
    assert hub.repositories["bob/public"].files() == {}


def test_a_token_that_may_only_read(hub: Hub, folder: Path) -> None:
    api = HfApi(endpoint=hub.endpoint, token=hub.add_account(Account("alice", role="read")))
    with pytest.raises(PublishFailed, match="may only read"):
        check_access(Destination(REPO), api=api)
    with pytest.raises(PublishFailed, match="403"):
        push(folder, api)


def test_a_failed_commit_shows_nothing_and_can_be_repeated(hub: Hub, api: HfApi, folder: Path) -> None:
    hub.fail_next(f"{REPO}/commit/", status=500, message=f"out of order for {hub.token}")
    with pytest.raises(PublishFailed) as caught:
        push(folder, api, private=True)
    message = str(caught.value)
    assert "out of order for hf_***" in message
    assert hub.token not in message
    assert f"corda-convert push '{folder}' {REPO} --private --commit-message" in message
    assert hub.repositories[REPO].files() == {}

    uploads = len(hub.requests_to("/lfs-storage/"))
    push(folder, api, private=True)
    assert hub.repositories[REPO].files() == shown_files(folder)
    assert len(hub.requests_to("/lfs-storage/")) == uploads, "what was uploaded is not uploaded again"


def test_an_upload_that_fails_once_is_repeated_by_the_client(hub: Hub, api: HfApi, folder: Path) -> None:
    hub.fail_next("/lfs-storage/", status=503)
    push(folder, api)
    assert hub.repositories[REPO].files() == shown_files(folder)
    assert len(hub.requests_to("/lfs-storage/")) == 4


def test_a_refused_upload_is_told_with_its_cause(hub: Hub, api: HfApi, folder: Path) -> None:
    hub.fail_next("/lfs-storage/", status=403, message="the storage is full")
    with pytest.raises(PublishFailed, match="the storage is full") as caught:
        push(folder, api)
    assert "/lfs-storage/" in str(caught.value)
    assert "Signature" not in str(caught.value)
    assert hub.repositories[REPO].files() == {}


@pytest.mark.parametrize(
    ("path_substring", "status", "advice"),
    [
        ("/api/repos/create", 409, None),  # the repository exists: that is fine
        ("/api/repos/create", 502, "try again later"),
        (f"/api/models/{REPO}/tree", 404, "Check the name"),
        ("/commit/main", 403, "may write"),
        ("/info/lfs/objects/verify", 422, "push it again"),
    ],
)
def test_refusals_of_the_hub(
    hub: Hub, api: HfApi, folder: Path, path_substring: str, status: int, advice: str | None
) -> None:
    hub.add_repository(REPO)
    if advice is None:
        push(folder, api)
        return
    hub.fail_next(path_substring, status=status, message="because")
    with pytest.raises(PublishFailed, match=advice) as caught:
        push(folder, api)
    assert "because" in str(caught.value.why)
    assert hub.repositories[REPO].files() == {}


def test_a_commit_of_somebody_else_meanwhile(hub: Hub, api: HfApi, folder: Path) -> None:
    class Meddled(HfApi):
        def create_commit(self, *args, **kwargs):
            hub.repositories[REPO].add_commit("main", "meanwhile", {})
            return super().create_commit(*args, **kwargs)

    with pytest.raises(PublishFailed, match="Somebody else"):
        push(folder, Meddled(endpoint=hub.endpoint, token=hub.token))
    assert hub.repositories[REPO].files() == {}


@pytest.mark.parametrize(
    ("path", "change", "problem"),
    [
        ("model-00001-of-00002.safetensors", lambda content: content[:-1], "bytes instead of"),
        ("model-00001-of-00002.safetensors", lambda content: b"\xff" + content[1:], "another content"),
        ("config.json", lambda content: content.upper(), "another content"),
    ],
)
def test_what_the_hub_stored_otherwise_is_noticed(hub: Hub, api: HfApi, folder: Path, path, change, problem) -> None:
    hub.corrupt_next(path, change)
    with pytest.raises(PublishFailed, match=f"{path} .*{problem}") as caught:
        push(folder, api)
    assert "corda-convert push" in str(caught.value.next_step)


def test_a_file_that_a_rule_of_the_repository_leaves_out_is_noticed(hub: Hub, api: HfApi, folder: Path) -> None:
    hub.add_repository(REPO).ignored = ("*.json",)
    with pytest.raises(PublishFailed, match=r"config\.json is missing"):
        push(folder, api)


def test_a_card_with_invalid_metadata(hub: Hub, api: HfApi, folder: Path) -> None:
    (folder / "README.md").write_text("---\n: [\n---\n")
    with pytest.raises(PublishFailed, match=r"Invalid metadata in README\.md"):
        push(folder, api)
    assert hub.repositories[REPO].files() == {}


def test_nobody_answers(hub: Hub, folder: Path) -> None:
    with running_hub() as gone:
        pass
    api = HfApi(endpoint=gone.endpoint, token=hub.token)
    for attempt in (lambda: push(folder, api), lambda: check_access(Destination(REPO), api=api)):
        with pytest.raises(PublishFailed, match="Check the connection"):
            attempt()


def test_offline(hub: Hub, api: HfApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PublishFailed, match="Unset HF_HUB_OFFLINE"):
        check_access(Destination(REPO), api=api)


def test_folders_that_cannot_be_published(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    (tmp_path / "hidden" / ".cache").mkdir(parents=True)
    (tmp_path / "hidden" / ".cache" / "x").touch()
    for folder in (tmp_path / "absent", tmp_path / "hidden"):
        with pytest.raises(InputNotFound):
            push(folder, api)
    assert hub.requests == []


def test_mistakes_of_this_program_are_not_translated() -> None:
    with pytest.raises(KeyError), translated_errors("Publishing failed."):
        raise KeyError("a bug")


def test_a_branch_is_made_and_main_stays_as_it_was(hub: Hub, api: HfApi, folder: Path) -> None:
    hub.add_repository(REPO)
    published = push(folder, api, revision="v2/äöü")
    repository = hub.repositories[REPO]
    assert repository.files("v2/äöü") == shown_files(folder)
    assert repository.files("main") == {}
    assert published.url == f"{hub.endpoint}/{REPO}/tree/v2/äöü"
    assert published.commit == repository.branches["v2/äöü"]
    assert not push(folder, api, revision="v2/äöü").is_new


def test_a_branch_that_would_begin_with_other_weights_is_not_made(hub: Hub, api: HfApi, folder: Path) -> None:
    hub.add_repository(REPO).add_commit("main", "old", {"model.safetensors": StoredFile(b"old", lfs=True)})
    with pytest.raises(PublishFailed, match=r"branch v2\) has weights .* model\.safetensors"):
        push(folder, api, revision="v2")
    assert list(hub.repositories[REPO].branches) == ["main"]


@pytest.mark.parametrize("target", ["main", "v2"])
def test_a_pull_request_is_opened_and_checked(hub: Hub, api: HfApi, folder: Path, target: str) -> None:
    published = push(folder, api, create_pr=True, revision=None if target == "main" else target)
    repository = hub.repositories[REPO]
    assert published.pull_request == f"{hub.endpoint}/{REPO}/discussions/1"
    assert repository.branches["refs/pr/1"] == published.commit
    assert repository.files("refs/pr/1") == shown_files(folder)
    assert repository.files(target) == {}
    assert repository.commits[published.commit].parent == repository.branches[target]


def test_a_damaged_pull_request_is_noticed(hub: Hub, api: HfApi, folder: Path) -> None:
    hub.corrupt_next("config.json", lambda content: content.upper())
    with pytest.raises(PublishFailed, match=r"config\.json has another content"):
        push(folder, api, create_pr=True)


def test_a_pull_request_in_somebody_elses_repository(hub: Hub, api: HfApi, folder: Path) -> None:
    repository = hub.add_repository("bob/public")
    check_access(Destination("bob/public", create_pr=True), api=api)
    assert push(folder, api, repo_id="bob/public", create_pr=True).pull_request
    assert repository.files() == {}
    assert repository.files("refs/pr/1") == shown_files(folder)


def test_large_files_go_up_in_parts(hub: Hub, api: HfApi, folder: Path) -> None:
    hub.part_bytes = 1024 * 1024
    push(folder, api)
    assert hub.repositories[REPO].files() == shown_files(folder)
    assert len(hub.requests_to("/lfs-part/", "PUT")) == 6
    assert len(hub.requests_to("/lfs-storage/", "PUT")) == 1


def test_weights_go_up_before_anything_else_and_are_read_once(
    hub: Hub, api: HfApi, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    monkeypatch.setattr("huggingface_hub.lfs.sha_fileobj", lambda file: hashed.append(file.name))
    (folder / "tokenizer.bin").write_bytes(b"stored with LFS, and no weights")
    push(folder, api)
    uploads = [request.path for request in hub.requests_to("/lfs-storage/", "PUT")]
    last = hashlib.sha256(b"stored with LFS, and no weights").hexdigest()
    assert len(uploads) == 4
    assert uploads[-1].endswith(last)
    assert hashed == []


@pytest.mark.parametrize("part_bytes", [None, 1024 * 1024])
@pytest.mark.parametrize(
    "fault",
    [
        {"uploaded": 1000},
        {"is_lost": True},
        {"delay": 0.6},
    ],
    ids=["connection dropped", "answer lost", "slow"],
)
def test_a_disturbed_upload_is_tried_again(
    hub: Hub, api: HfApi, folder: Path, monkeypatch: pytest.MonkeyPatch, fault: dict[str, object], part_bytes
) -> None:
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    monkeypatch.setattr("corda_convert.hub.client.ANSWER_SECONDS", 0.4)
    hub.part_bytes = part_bytes
    hub.interfere_next("/lfs-", method="PUT", **fault)
    push(folder, api)
    assert hub.repositories[REPO].files() == shown_files(folder)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_asked_again(hub: Hub, api: HfApi, folder: Path, monkeypatch, status: int) -> None:
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    for path in ("/preupload/", "/objects/batch", "/lfs-storage/", "/objects/verify"):
        hub.fail_next(path, status=status, times=2)
    push(folder, api)
    assert hub.repositories[REPO].files() == shown_files(folder)


@pytest.mark.parametrize(
    ("path", "status", "advice"),
    [
        ("/preupload/", 429, "asked too often"),
        ("/objects/batch", 500, "try again later"),
        ("/lfs-storage/", 403, "may write"),
        ("/lfs-storage/", 503, "try again later"),
        ("/commit/", 401, "hf auth login"),
        ("/commit/", 403, "may write"),
        ("/commit/", 404, "Check the name"),
        ("/commit/", 429, "asked too often"),
        ("/commit/", 500, "try again later"),
        ("/api/whoami", 429, "asked too often"),
        ("/api/whoami", 500, "try again later"),
    ],
)
def test_what_the_hub_keeps_refusing_is_one_message_and_nothing_is_visible(
    hub: Hub, api: HfApi, folder: Path, monkeypatch, path: str, status: int, advice: str
) -> None:
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    hub.add_repository(REPO)
    hub.fail_next(path, status=status, times=100, message="because")
    with pytest.raises(PublishFailed, match=advice) as caught:
        check_access(Destination(REPO), api=api)
        push(folder, api)
    assert str(caught.value.why)
    assert "Signature" not in str(caught.value)
    assert "whoami" in path or "push it again with: corda-convert push" in str(caught.value.next_step)
    assert hub.repositories[REPO].files() == {}


def test_a_connection_that_keeps_breaking_is_one_message(hub: Hub, api: HfApi, folder: Path, monkeypatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    hub.interfere_next("/lfs-storage/", uploaded=1000, times=100)
    with pytest.raises(PublishFailed, match="Check the connection") as caught:
        push(folder, api)
    assert "push it again with" in str(caught.value.next_step)
    assert hub.repositories[REPO].files() == {}


def test_a_hub_that_never_answers_is_given_up(hub: Hub, api: HfApi, folder: Path, monkeypatch) -> None:
    monkeypatch.setattr("corda_convert.hub.client.ANSWER_SECONDS", 0.3)
    hub.interfere_next("/commit/", delay=1.0, is_lost=True)
    with pytest.raises(PublishFailed, match="Check the connection"):
        push(folder, api)
    assert huggingface_hub.get_session().timeout.read is None, "the client's own setting is back"


def test_an_upload_that_stopped_halfway_is_gone_on_with(hub: Hub, api: HfApi, folder: Path) -> None:
    second = hashlib.sha256(WEIGHTS[::-1]).hexdigest()
    hub.fail_next(second, status=403)
    with pytest.raises(PublishFailed):
        push(folder, api)
    repository = hub.repositories[REPO]
    assert repository.files() == {}
    stored = set(repository.lfs_objects)
    assert hashlib.sha256(WEIGHTS).hexdigest() in stored
    hub.requests.clear()
    push(folder, api)
    assert repository.files() == shown_files(folder)
    again = {request.path.rpartition("/")[2] for request in hub.requests_to("/lfs-storage/", "PUT")}
    assert second in again
    assert again.isdisjoint(stored)


def test_a_commit_whose_answer_was_lost_is_found_again(hub: Hub, api: HfApi, folder: Path) -> None:
    hub.interfere_next("/commit/", is_lost=True)
    published = push(folder, api)
    (made,) = hub.repositories[REPO].history()
    assert published.commit == made.oid
    assert published.is_new


def test_a_lost_answer_about_a_pull_request_is_told(hub: Hub, api: HfApi, folder: Path) -> None:
    hub.interfere_next("/commit/", is_lost=True)
    with pytest.raises(PublishFailed, match="pull request"):
        push(folder, api, create_pr=True)
    assert len(hub.requests_to("/commit/")) == 1, "a second one would be opened"


def other_commit(hub: Hub, **files: bytes):
    """Somebody else's commit, on top of what is there."""

    def commit() -> None:
        repository = hub.repositories[REPO]
        tree = repository.resolve("main").files
        repository.add_commit("main", "meanwhile", {**tree, **{name: StoredFile(c) for name, c in files.items()}})

    return commit


def test_a_commit_follows_one_of_somebody_else_to_other_files(hub: Hub, api: HfApi, folder: Path) -> None:
    hub.interfere_next("/commit/", first=other_commit(hub, LICENSE=b"theirs"))
    published = push(folder, api)
    repository = hub.repositories[REPO]
    assert repository.files() == {**shown_files(folder), "LICENSE": b"theirs"}
    assert [commit.title for commit in repository.history()] == ["meanwhile", "Publish the merged model"]
    assert published.commit == repository.branches["main"]


def test_a_commit_of_somebody_else_to_the_same_file_stops_the_push(hub: Hub, api: HfApi, folder: Path) -> None:
    hub.add_repository(REPO)
    hub.interfere_next("/commit/", first=other_commit(hub, **{"README.md": b"theirs"}))
    with pytest.raises(PublishFailed, match=r"Somebody else changed README\.md"):
        push(folder, api)
    assert hub.repositories[REPO].files() == {"README.md": b"theirs"}


def test_weights_of_somebody_else_stop_the_push(hub: Hub, api: HfApi, folder: Path) -> None:
    hub.interfere_next("/commit/", first=other_commit(hub, **{"pytorch_model.bin": b"theirs"}))
    with pytest.raises(PublishFailed, match=r"has weights .* pytorch_model\.bin"):
        push(folder, api)
    assert hub.repositories[REPO].files() == {"pytorch_model.bin": b"theirs"}


@pytest.mark.parametrize(
    ("moment", "said"), [("/objects/batch", "another sha256"), ("/objects/verify", "changed while it was uploaded")]
)
def test_a_file_that_changes_while_it_is_uploaded_is_noticed(
    hub: Hub, api: HfApi, folder: Path, moment: str, said: str
) -> None:
    path, *others = [*sorted(folder.rglob("model*.safetensors")), folder / "corda_init/adapter_model.safetensors"]
    for other in others:
        other.unlink()
    hub.interfere_next(moment, first=lambda: path.write_bytes(WEIGHTS[::-1]))
    with pytest.raises(PublishFailed, match=said):
        push(folder, api)
    assert hub.repositories[REPO].files() == {}


def test_branches_and_ranges(hub: Hub, api: HfApi, folder: Path) -> None:
    push(folder, api)
    api.create_branch(REPO, branch="v1")
    api.delete_file("config.json", REPO)
    assert "config.json" in api.list_repo_files(REPO, revision="v1")
    assert "config.json" not in api.list_repo_files(REPO)
    url = f"{hub.endpoint}/{REPO}/resolve/v1/model-00001-of-00002.safetensors"
    headers = {"Authorization": f"Bearer {hub.token}", "Range": "bytes=8-15"}
    response = huggingface_hub.get_session().get(url, headers=headers)
    assert (response.status_code, response.content) == (206, WEIGHTS[8:16])


@pytest.mark.parametrize("logged_in", [True, False])
def test_in_a_process_of_its_own(hub: Hub, folder: Path, tmp_path: Path, logged_in: bool) -> None:
    """The endpoint and the token come from the environment alone, and torch is not needed."""
    program = f"""
import json, sys
from pathlib import Path
from corda_convert.errors import PublishFailed
from corda_convert.hub import Destination, check_access, push_folder
assert "huggingface_hub" not in sys.modules
try:
    check_access(Destination({REPO!r}))
    made = push_folder(Path({str(folder)!r}), Destination({REPO!r}, message="From a child"))
except PublishFailed as error:
    raise SystemExit(str(error))
assert "torch" not in sys.modules
print(json.dumps([made.url, made.commit]))
"""
    environment = hub.environment(tmp_path / "child", token="" if logged_in else None)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=600)
    if logged_in:
        (made,) = hub.repositories[REPO].history()
        assert json.loads(done.stdout) == [f"{hub.endpoint}/{REPO}", made.oid]
    else:
        assert done.returncode == 1
        assert "hf auth login" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda receipt: receipt.pop("files"), "it has no 'files'"),
        (lambda receipt: receipt.update(files=None), "is damaged"),
        (lambda receipt: receipt["files"][0].pop("bytes"), "it has no 'bytes'"),
        (lambda receipt: receipt["files"][0].update(name=["a"]), "stands where a name was expected"),
        (lambda receipt: receipt["files"][0].update(name="../a"), "is no path of a file in the folder"),
        (lambda receipt: receipt["files"].append(receipt["files"][0]), "a file stands twice"),
        (lambda receipt: receipt["files"].append({"name": "b", "bytes": "1", "sha256": 1}), "size was expected"),
        (lambda receipt: receipt.update(streamed_to={"files": [["a"]]}, inputs=7), "is damaged"),
        (lambda receipt: receipt.update(result=float("nan")), "is damaged: Out of range float"),
        (lambda receipt: receipt.update(format_version=2), "receipt version 2"),
    ],
)
def test_push_refuses_a_damaged_receipt_in_one_message(
    hub: Hub, damage, said: str, command, tmp_path: Path, monkeypatch
) -> None:
    folder = tmp_path / "output"
    folder.mkdir()
    (folder / "README.md").write_text("# output\n")
    digest = hashlib.sha256(b"# output\n").hexdigest()
    receipt = {
        "format": "corda_convert.receipt",
        "format_version": 1,
        "command": "merge",
        "options": {},
        "inputs": [],
        "files": [{"name": "README.md", "bytes": 9, "sha256": digest}],
        "tensors": [],
    }
    damage(receipt)
    (folder / "corda_convert.json").write_text(json.dumps(receipt))
    monkeypatch.setenv("HF_TOKEN", hub.token)
    ran = command("push", folder, "alice/lora")
    assert (ran.status, ran.out) == (1, "")
    assert said in ran.err
    assert "Traceback" not in ran.err
    assert hub.repositories == {}
