# Inspect: a task with a solver and a scorer, through its provider for OpenAI-compatible servers.
set -eu
export GRU_BASE_URL="$BASE_URL" GRU_API_KEY="$API_KEY"
cp "$HERE/play.py" .
inspect eval play.py --model "openai-api/gru/$MODEL" --display plain --log-dir logs --no-fail-on-error
inspect log dump logs/*.eval | python -c '
import json, sys
log = json.load(sys.stdin)
assert log["status"] == "success", log["status"]
assert log["results"]["completed_samples"] == 2
assert all(each["output"]["completion"] for each in log["samples"])'
echo ok
