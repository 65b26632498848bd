"""CPU features: exactly those that decide which kernels run."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from tdm_runtime.backends.cpu import ISA_LIMIT, cpu_features, kernel_features

CPUINFO = Path("/proc/cpuinfo")


def test_only_kernel_features_are_listed_in_order() -> None:
    xeon = {"sse4_1": True, "avx512_f": True, "avx2": True, "amx_int8": True, "clflush": True, "fma3": True}
    others = {"architecture": "x86_64", "avx512_fp16": False, "num_logical_cores": 2, "cpu_name": "A CPU"}
    assert kernel_features(xeon | others) == ("x86_64", "amx_int8", "avx2", "avx512_f", "fma3")


def test_the_vector_width_of_arm64_is_a_feature() -> None:
    """ARM64 kernels depend on the width."""
    arm = {"architecture": "aarch64", "sve": True, "sve_max_length": 32, "sme": False, "neon": True, "aes": True}
    assert kernel_features(arm) == ("aarch64", "neon", "sve", "sve_max_length=32")


@pytest.mark.skipif(platform.machine() != "x86_64" or not CPUINFO.is_file(), reason="no /proc/cpuinfo of x86-64")
def test_the_features_of_this_cpu_match_proc_cpuinfo() -> None:
    """/proc/cpuinfo spells some names differently, such as avx512f for avx512_f."""
    lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    flags = next(line for line in lines if line.startswith("flags")).partition(":")[2].replace("_", "").split()
    features = {name.replace("_", "") for name in cpu_features()}
    assert cpu_features()[0] == "x86_64"
    for name in (
        "avx2",
        "avx512f",
        "avx512vnni",
        "avx512bf16",
        "avx512fp16",
        "avxvnni",
        "amxtile",
        "amxint8",
        "amxbf16",
    ):
        assert (name in features) == (name in flags), name


def test_a_limit_on_kernels_is_a_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA_LIMIT, "")
    unlimited = cpu_features()
    monkeypatch.setenv(ISA_LIMIT, "AVX2")
    assert cpu_features() == (*unlimited, "ONEDNN_MAX_CPU_ISA=AVX2")
