# simonw's llm: a completion model and a chat model, declared in its folder as its documentation says: a key needs a name there.
set -eu
export LLM_USER_PATH="$(mktemp -d)"
trap 'rm -rf "$LLM_USER_PATH"' EXIT
cat > "$LLM_USER_PATH/extra-openai-models.yaml" <<YAML
- model_id: gru-text
  model_name: $MODEL
  api_base: $BASE_URL
  api_key_name: gru
  completion: true
- model_id: gru-chat
  model_name: $MODEL
  api_base: $BASE_URL
  api_key_name: gru
YAML
llm keys set gru --value "$API_KEY"
llm models | grep gru-chat > models

text=$(llm -m gru-text -o max_tokens 40 -o seed 7 'ROMEO:')
[ "$text" = "$(llm -m gru-text -o max_tokens 40 -o seed 7 --no-stream 'ROMEO:')" ]
[ -n "$text" ]

answer=$(llm -m gru-chat -o max_tokens 40 -o seed 7 -s 'A play.' 'Who goes there?')
[ "$answer" = "$(llm -m gru-chat -o max_tokens 40 -o seed 7 --no-stream -s 'A play.' 'Who goes there?')" ]
[ -n "$answer" ]
[ -n "$(llm -c -o max_tokens 40 'And you?')" ]
echo ok
