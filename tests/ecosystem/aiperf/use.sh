# aiperf: streamed completions of a fixed length, after it has waited until the model is listed and answers.
set -eu
unset HF_HUB_OFFLINE  # with it, aiperf looks for the tokenizer in a cache even if it is given a folder
mkdir tokenizer
for file in tokenizer.json tokenizer_config.json; do
  curl -sf -H "Authorization: Bearer $API_KEY" "$BASE_URL/models/$MODEL/$file" -o "tokenizer/$file"
done
aiperf profile --model "$MODEL" --url "$HOST_URL" --api-key "$API_KEY" --endpoint-type completions --streaming \
  --tokenizer "$PWD/tokenizer" --isl 40 --osl 24 --extra-inputs ignore_eos:true --extra-inputs min_tokens:24 \
  --request-count 6 --concurrency 2 --wait-for-model-timeout 60 --wait-for-model-mode both --ui-type none --artifact-dir artifacts
python - <<PYTHON
import json
from pathlib import Path

(path,) = Path("artifacts").rglob("profile_export_aiperf.json")
report = json.loads(path.read_text())
assert report["request_count"]["avg"] == 6, report["request_count"]
assert report["output_sequence_length"]["avg"] == 24, report["output_sequence_length"]
PYTHON
echo ok
