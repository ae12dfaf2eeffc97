"""The Hub that the tests speak to answers as huggingface_hub expects."""

from pathlib import Path

import fsspec
import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

REPO = "tester/server"


@pytest.fixture(scope="module")
def api(hub, tmp_path_factory):
    api, folder = HfApi(), tmp_path_factory.mktemp("server")
    (folder / "deep").mkdir()
    (folder / "weights.safetensors").write_bytes(bytes(range(256)) * 100)
    (folder / "deep" / "note.txt").write_text("first")
    api.create_repo(REPO, exist_ok=True)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    return api


def test_files_are_stored_unchanged(api, hub, tmp_path):
    folder = snapshot_download(REPO, local_dir=tmp_path)
    assert (tmp_path / "weights.safetensors").read_bytes() == bytes(range(256)) * 100
    assert Path(folder, "deep/note.txt").read_text() == "first"
    names = {
        file.path: file.lfs is not None for file in api.list_repo_tree(REPO, recursive=True) if hasattr(file, "lfs")
    }
    assert names == {".gitattributes": False, "deep/note.txt": False, "weights.safetensors": True}
    found = {entry.path: entry for entry in api.get_paths_info(REPO, ["deep", "weights.safetensors", "nothing"])}
    assert set(found) == {"deep", "weights.safetensors"} and found["weights.safetensors"].size == 25_600
    with fsspec.open(f"hf://{REPO}/weights.safetensors") as file:
        file.seek(1000)
        assert file.read(4) == bytes([232, 233, 234, 235])  # only a range was asked for


def test_branches_tags_and_history(api):
    first = api.model_info(REPO).sha
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="next")
    api.upload_file(repo_id=REPO, path_or_fileobj=b"second", path_in_repo="deep/note.txt", revision="next")
    refs = api.list_repo_refs(REPO)
    assert {tag.name: tag.target_commit for tag in refs.tags} == {"v1": first}
    assert {branch.name for branch in refs.branches} == {"main", "next"}
    assert Path(hf_hub_download(REPO, "deep/note.txt", revision="v1")).read_text() == "first"
    assert Path(hf_hub_download(REPO, "deep/note.txt", revision="next")).read_text() == "second"
    assert len(api.list_repo_commits(REPO, revision="next")) == 3


def test_errors_match_the_hub(api):
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "nothing.txt")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "deep/note.txt", revision="nowhere")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("tester/nobody")
    with pytest.raises(HfHubHTTPError, match="401"):
        api.upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="x", token="hf_wrong")
    with pytest.raises(HfHubHTTPError, match="(?i)invalid"):
        api.whoami(token="hf_wrong")
    assert api.whoami()["name"] == "tester"


def test_a_private_repository_needs_the_token(api):
    api.create_repo("tester/hidden", private=True, exist_ok=True)
    assert api.model_info("tester/hidden").private
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("tester/hidden", token=False)
    api.delete_repo("tester/hidden")
    assert not api.repo_exists("tester/hidden")
