"""The two ends of the scale: training as if there were no other task, and on all tasks at once."""

from lance_jax.continual_methods.method import Method, Plan, Setting


def _plan(setting: Setting) -> Plan:
    return Plan()


finetune = Method(_plan)
joint = Method(_plan, mixes=True, joint=True)
