"""The vLLM integration: stages, steps and requests of vLLM and vllm-ascend, by hooks put in while they are imported."""
