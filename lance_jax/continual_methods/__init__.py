"""The methods of continual learning, by name: a file for each family."""

from lance_jax.continual_methods.ewc import ewc
from lance_jax.continual_methods.lance import lance, lance_authors, lance_scaled
from lance_jax.continual_methods.lora import lora_dynamic, lora_per_task, lora_shared
from lance_jax.continual_methods.method import Method
from lance_jax.continual_methods.plain import finetune, joint
from lance_jax.continual_methods.projection import gpm, gpm_int4, sgp
from lance_jax.continual_methods.replay import er

METHODS: dict[str, Method] = {
    "finetune": finetune,
    "joint": joint,
    "gpm": gpm,
    "gpm_int4": gpm_int4,
    "sgp": sgp,
    "lance": lance,
    "lance_scaled": lance_scaled,
    "lance_authors": lance_authors,
    "ewc": ewc,
    "er": er,
    "lora_per_task": lora_per_task,
    "lora_shared": lora_shared,
    "lora_dynamic": lora_dynamic,
}
