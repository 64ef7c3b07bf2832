"""What an engine on CPU imports sooner or later: for the process that generators are forks of.

Without Ray, which reads its environment when it is imported, and which vLLM asks for executors that nothing here uses.
"""

from rlhf_ray.engines.generation import import_vllm
from rlhf_ray.models.light import absent

with absent("ray"):
    import_vllm()
    import vllm.v1.engine.llm_engine
    import vllm.v1.executor.uniproc_executor
    import vllm.v1.worker.cpu_model_runner
    import vllm.v1.worker.cpu_worker  # noqa: F401

    import rlhf_ray.engines.weight_sync  # noqa: F401
