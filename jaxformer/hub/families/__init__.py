"""The families of checkpoints that can be read and written, by their model type."""

from jaxformer.hub.families import bart, bert, gpt2, llama, t5
from jaxformer.hub.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for module in (t5, bart, gpt2, llama, bert)
    for family in module.FAMILIES
}
