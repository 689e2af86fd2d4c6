"""The methods of continual learning, by name: a file for each family."""

from lance_jax.continual_methods import ewc, lance, lora, plain, projection, replay
from lance_jax.continual_methods.method import Method

METHODS: dict[str, Method] = {
    "finetune": plain.finetune,
    "joint": plain.joint,
    "gpm": projection.gpm,
    "gpm_int4": projection.gpm_int4,
    "sgp": projection.sgp,
    "lance": lance.lance,
    "lance_scaled": lance.lance_scaled,
    "lance_authors": lance.lance_authors,
    "ewc": ewc.ewc,
    "er": replay.er,
    "lora_per_task": lora.lora_per_task,
    "lora_shared": lora.lora_shared,
    "lora_dynamic": lora.lora_dynamic,
}
