export VLLM_IMAGE_FETCH_TIMEOUT=<timeout>
