"""The kind of machine that a bench ran on, and the versions; never its name, never a folder."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from fedkd.versions import commit, versions

FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")
OTHERS = ("ray", "pfl", "triton")


def machine(proc: Path = Path("/proc")) -> dict[str, Any]:
    """Return processor, cores that we may use, memory in GiB, and what the processor can do."""
    model, flags = platform.processor() or platform.machine(), set[str]()
    try:
        for line in (proc / "cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags |= set(value.split())
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        pages = 0
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    return {
        "system": platform.system(),
        "cpu": model,
        "cores": cores,
        "ram_gib": round(pages / 2**30),
        "flags": [flag for flag in FLAGS if flag in flags],
    }


def software() -> dict[str, str]:
    """Return the versions of all that figures depend on, and our commit."""
    found = versions() | {"commit": commit()}
    for package in OTHERS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
