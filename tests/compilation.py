"""How tests compile: they compile more than they run, so little is optimised."""

from collections.abc import Iterator
from contextlib import contextmanager

QUICK = (
    "--xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
"""XLA's flags for it: less than half the time. `conftest.py` sets them for all tests."""

AS_USERS = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
"""The `compiler_options` of a function that is compiled as anywhere else."""


@contextmanager
def counted() -> Iterator[list[str]]:
    """Within it, the list grows by one for everything that jax compiles, or finds compiled on disk:
    whatever is not in this process yet."""
    from jax import monitoring  # not before conftest.py has set the flags

    compiled: list[str] = []

    def note(event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    monitoring.register_event_duration_secs_listener(note)
    yield compiled
    monitoring.unregister_event_duration_listener(note)
