"""Environment variables for this process and all that it starts: loopback bypasses proxies, caches are writable."""

import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

LOOPBACK = ("localhost", "127.0.0.1", "::1")
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
SCHEMES = ("http", "https", "socks5", "socks5h")  # of proxies that the HTTP libraries can use

# Where libraries keep files below the home directory, by the variable that moves them. Credentials stay where they are.
CACHES = {
    "PREFECT_HOME": ".prefect",
    "MPLCONFIGDIR": ".config/matplotlib",
    "WANDB_CACHE_DIR": ".cache/wandb",
    "WANDB_CONFIG_DIR": ".config/wandb",
    "WANDB_DATA_DIR": ".local/share/wandb",
    "TORCHINDUCTOR_CACHE_DIR": ".cache/torch/inductor",
    "TRITON_CACHE_DIR": ".triton/cache",
    "CUDA_CACHE_PATH": ".nv/ComputeCache",
}


def prepare_proxies() -> None:
    """Exempt loopback from proxies, and drop those that our HTTP clients cannot use. Downloads keep using the rest."""
    for name in (variable for lower in PROXIES for variable in (lower, lower.upper())):
        proxy = os.environ.get(name, "")
        if proxy.startswith("socks://"):  # as desktop environments write it
            proxy = os.environ[name] = proxy.replace("socks", "socks5", 1)
        if proxy and not _usable(proxy):
            print(f"{name} is ignored: not a URL of type {', '.join(SCHEMES)}. Correct or unset it.", file=sys.stderr)
            del os.environ[name]
    bypass_proxies(*LOOPBACK)


def bypass_proxies(*hosts: str) -> None:
    """Requests to `hosts` go there directly, also from processes started later."""
    # Libraries differ in which of the two they read, and in which they prefer.
    listed = [host for name in ("no_proxy", "NO_PROXY") for host in os.environ.get(name, "").split(",")]
    names = dict.fromkeys(name for host in [*listed, *hosts] if (name := host.strip()))
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(names)


def _usable(proxy: str) -> bool:
    try:
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        return parts.scheme in SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def user_path(text: str) -> Path:
    """The path as a shell expands it; `~NAME` of an unknown user is a plain name."""
    return Path(os.path.expanduser(text))


def prepare_caches(store: Path) -> None:
    """Move caches into the store if their folder, chosen or default, cannot be written."""
    home = os.path.expanduser("~")
    if home == "~":  # a user without an entry in /etc/passwd; some libraries fail where no home is known
        os.environ["HOME"] = str(store / "cache")
    for name, usual in CACHES.items():
        chosen = os.environ.get(name) or (os.path.join(home, usual) if os.path.isdir(home) else "")
        if not chosen or not _writable(Path(os.path.abspath(os.path.expanduser(chosen)))):
            os.environ[name] = str(store / "prefect" if name == "PREFECT_HOME" else store / "cache" / name.lower())


def _writable(folder: Path) -> bool:
    """Return True if `folder` can be written, or created."""
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)
