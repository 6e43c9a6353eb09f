"""Post a job from Python, follow it, fetch the result: python examples/submit.py [BASE_MODEL]"""

import sys

from sftd import Client

client = Client()  # the server on this machine, or SFTD_URL and SFTD_API_KEY
data = client.files.upload("examples/q_basics.jsonl")
job = client.jobs.create(
    base_model=sys.argv[1] if len(sys.argv) > 1 else "Qwen/Qwen2.5-0.5B-Instruct",
    method="lora",
    training_file=data.id,
    validation_split=0.1,
    max_steps=20,
    learning_rate=2e-4,
    warmup_steps=2,
)
done = client.jobs.wait(job.id, on_progress=lambda now: print(now.state, now.step, now.loss))
print("evaluation loss", done.eval_loss)
print("result in", client.jobs.download(job.id, f"result-{job.id}")[0].parent)
