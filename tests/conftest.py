"""For all tests: eight virtual CPU devices, quick compilation, and shapes and types checked."""

import os

from compilation import QUICK

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    f" --xla_force_host_platform_device_count=8 {QUICK}"
)

from jaxtyping import install_import_hook  # noqa: E402

# The modules that compute with arrays.
CHECKED = ["jaxformer.nn", "jaxformer.decoding", "jaxformer.training.loss"]
install_import_hook(CHECKED, "beartype.beartype")

import jax  # noqa: E402
from hypothesis import settings  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "standard")
settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")
