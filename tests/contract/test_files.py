"""OpenAI's files and uploads, through its own package."""


def test_files(box, run_script) -> None:
    run_script(box, "files.py")


def test_uploads(box, run_script) -> None:
    run_script(box, "uploads.py")
