opsin serve TIGER-Lab/VLM2Vec-Full --task embedding \
  --trust-remote-code --max-model-len 4096 --chat-template examples/template_vlm2vec.jinja
