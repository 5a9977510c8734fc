"""Names of results: every source gets its own."""

from pathlib import Path

from tvqrap.images.jobs import Job, plan_jobs


def names(*sources, compare=False):
    jobs = plan_jobs([Path(source) for source in sources], Path("out"), "png", compare=compare)
    return [job.result.name for job in jobs]


def test_names_that_would_meet_are_kept_apart():
    assert names("a.png", "b.png") == ["a.png", "b.png"]
    assert names("a.png", "a.jpg", "b.png") == ["a_png.png", "a_jpg.png", "b.png"]
    assert names("A.png", "a.jpg") == ["A_png.png", "a_jpg.png"]
    assert names("x/a.png", "y/a.png") == ["x_a_png.png", "y_a_png.png"]
    assert names("x/y/a.png", "z/y/a.png") == ["y_a_png.png", "y_a_png_2.png"]
    assert names("a.png", "a_comparison.png") == ["a.png", "a_comparison.png"]
    assert names("a.png", "a_comparison.png", compare=True) == ["a.png", "a_comparison_2.png"]
    assert names("a.b.png") == ["a.b.png"]


def test_no_two_jobs_share_a_file():
    sources = [
        f"{d}/{n}.{s}" for d in ("x", "y/x") for n in ("a", "A", "a_png") for s in ("png", "jpg")
    ]
    jobs = plan_jobs([Path(source) for source in sources], Path("out"), "jpg", compare=True)
    outputs = [str(path).lower() for job in jobs for path in job.outputs]
    assert len(set(outputs)) == len(outputs) == 24


def test_a_job_lists_its_files():
    assert Job(Path("a"), Path("b")).outputs == (Path("b"),)
    assert Job(Path("a"), Path("b"), Path("c")).outputs == (Path("b"), Path("c"))
