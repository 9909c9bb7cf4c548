import streamllm  # noqa: F401 (before any test or benchmark imports torch: OMP_WAIT_POLICY)
