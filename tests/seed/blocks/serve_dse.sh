opsin serve MrLight/dse-qwen2-2b-mrl-v1 --task embedding \
  --trust-remote-code --max-model-len 8192 --chat-template examples/template_dse_qwen2_vl.jinja
