# simonw's llm: a completion model and a chat model, declared in its folder as its documentation says.
set -eu
export LLM_USER_PATH="$(mktemp -d)"
trap 'rm -rf "$LLM_USER_PATH"' EXIT
cat > "$LLM_USER_PATH/extra-openai-models.yaml" <<YAML
- model_id: gru-text
  model_name: $MODEL
  api_base: $BASE_URL
  completion: true
- model_id: gru-chat
  model_name: $MODEL
  api_base: $BASE_URL
YAML
llm keys set openai --value "$API_KEY"
llm models | grep -q gru-chat

text=$(llm -m gru-text -o max_tokens 40 -o seed 7 'ROMEO:')
[ "$text" = "$(llm -m gru-text -o max_tokens 40 -o seed 7 --no-stream 'ROMEO:')" ]
[ -n "$text" ]

answer=$(llm -m gru-chat -o max_tokens 40 -o seed 7 -s 'A play.' 'Who goes there?')
[ "$answer" = "$(llm -m gru-chat -o max_tokens 40 -o seed 7 --no-stream -s 'A play.' 'Who goes there?')" ]
[ -n "$answer" ]
llm -c -o max_tokens 40 'And you?' | grep -q .
echo ok
