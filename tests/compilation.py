"""How tests compile: they compile more than they run, so little is optimised."""

QUICK = (
    "--xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
"""XLA's flags for it: less than half the time. `conftest.py` sets them for all tests."""

AS_USERS = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
"""The `compiler_options` of a function that is compiled as anywhere else."""
