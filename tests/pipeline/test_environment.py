"""Runs in unusual surroundings: proxies, homes that cannot be written, Prefect's address."""

import os
from pathlib import Path

import pytest

from pipeline.runner.environment import CACHES, bypass_proxies, prepare_caches, prepare_proxies
from pipeline.runner.server import configured_url
from tests.conftest import Chatmill
from tests.pipeline.small_store import small_store
from tests.pipeline.test_run import records, small_text_hub, toys
from tests.small_proxy import small_proxy

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the machine's own; what a test changes in this process is undone."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        os.environ.pop(name, None)
        os.environ.pop(name.upper(), None)


@pytest.mark.parametrize("scheme", [pytest.param("http", marks=pytest.mark.full), "socks5"])
def test_behind_a_proxy_a_run_talks_to_itself_directly_and_downloads_by_the_proxy(
    served: Chatmill, tmp_path: Path, scheme: str
) -> None:
    with small_text_hub(tmp_path, shards=2).serving() as hub, small_proxy(scheme, hub.url) as proxy:
        variable = "http_proxy" if scheme == "http" else "ALL_PROXY"
        download = ["data=fineweb_edu", "data.repo_id=me/text", "data.train_shards=1"]
        download += ["data.val_shard=shard_00001.parquet", "pipeline.stages=[download,a,b,c]"]
        env = {variable: proxy.url, "HF_ENDPOINT": "http://hub.invalid"}
        served.run_process(*toys(total="ranked")[1:], *download, **env)  # c runs under torchrun
    assert set(records(served.store)) == {"download", "a", "b", "c"}
    assert set(proxy.hosts) == {"hub.invalid"}


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "socks://127.0.0.1:9/", "socks4://x"])
def test_no_proxy_stands_between_prefect_and_loopback(variable: str, proxy: str) -> None:
    import httpx

    os.environ[variable] = proxy
    os.environ["no_proxy"] = "intra.example"
    prepare_proxies()
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "intra.example,localhost,127.0.0.1,::1"
    client = httpx.Client()  # fails for what it does not understand
    for url in ("http://127.0.0.1:4200/api", "http://localhost/", "http://[::1]:80/", "http://intra.example/"):
        assert client._transport_for_url(httpx.URL(url)) is client._transport
    usable = "socks4" not in proxy
    reached = "https" if variable == "https_proxy" else "http"
    assert (client._transport_for_url(httpx.URL(f"{reached}://hub.example/")) is not client._transport) == usable


def test_both_spellings_of_no_proxy_are_kept() -> None:
    os.environ |= {"NO_PROXY": "a.example, b.example", "no_proxy": "c.example"}
    bypass_proxies("192.0.2.7")
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "c.example,a.example,b.example,192.0.2.7"


@pytest.mark.parametrize("home", ["a file", pytest.param("absent", marks=pytest.mark.full)])
def test_without_a_writable_home_prefect_and_caches_live_in_the_store(
    chatmill: Chatmill, tmp_path: Path, home: str
) -> None:
    (tmp_path / "a file").touch()
    home = str(tmp_path / home if home == "a file" else "/absent/x")
    chatmill.run_process(*toys(), "until=a", HOME=home, PREFECT_HOME="")
    assert (chatmill.store / "prefect").is_dir()
    assert not Path("/absent").exists()
    assert records(chatmill.store)["a"]["metrics"]["numbers"] == 4


def test_only_caches_whose_usual_place_cannot_be_written_move_and_nothing_is_made(tmp_path: Path) -> None:
    for name in CACHES:
        os.environ.pop(name, None)
    os.environ["HOME"], os.environ["MPLCONFIGDIR"] = str(tmp_path), str(tmp_path / "mine")
    os.environ["TRITON_CACHE_DIR"] = "/dev/null/cannot"
    (tmp_path / ".prefect").touch()
    prepare_caches(tmp_path / "store")
    assert {name for name in CACHES if name in os.environ} == {"PREFECT_HOME", "MPLCONFIGDIR", "TRITON_CACHE_DIR"}
    assert os.environ["PREFECT_HOME"] == str(tmp_path / "store" / "prefect")
    assert os.environ["MPLCONFIGDIR"] == str(tmp_path / "mine")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "store" / "cache" / "triton_cache_dir")
    assert [path.name for path in tmp_path.iterdir()] == [".prefect"]


def test_a_user_without_any_home_gets_one_in_the_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in CACHES:
        os.environ.pop(name, None)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it is without HOME and an entry in /etc/passwd
    prepare_caches(tmp_path)
    assert all(os.environ[name].startswith(str(tmp_path)) for name in [*CACHES, "HOME"])


def test_an_empty_prefect_api_url_is_none() -> None:
    os.environ["PREFECT_API_URL"] = ""
    assert configured_url() == ""
    assert "PREFECT_API_URL" not in os.environ  # Prefect would take it for the URL of a server


def test_a_prefect_server_that_does_not_answer_is_one_line_with_its_url_and_the_way_out(chatmill: Chatmill) -> None:
    out = chatmill.run(*toys(), code=1, PREFECT_API_URL=f"{NOWHERE}/api")
    (line,) = (line for line in out.splitlines() if NOWHERE in line)
    assert f"PREFECT_API_URL={NOWHERE}/api" in line and "unset" in line and out.endswith(line + "\n")


def test_a_url_that_is_not_prefects_api_is_said(chatmill: Chatmill, prefect_server: str) -> None:
    out = chatmill.run(*toys(), code=2, PREFECT_API_URL=prefect_server.removesuffix("/api"))
    assert "ends in /api" in out


def test_the_chat_app_comes_up_behind_a_proxy_that_does_not_answer(chatmill: Chatmill) -> None:
    small_store(chatmill.store)
    process = chatmill.start("chat", "sft", "app.port=0", http_proxy=NOWHERE, ALL_PROXY="socks5://127.0.0.1:9")
    try:
        assert process.stdout is not None
        assert any("http://127.0.0.1:" in line for line in process.stdout), process.communicate()
    finally:
        process.kill()
        process.communicate()
