from pathlib import Path

from harness import paths


def test_a_checkout_uses_its_own_configuration():
    assert paths.conf_dir() == Path(paths.__file__).resolve().parents[1] / "conf"


def test_an_installed_package_uses_the_copy_inside(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "harness"
    package.mkdir(parents=True)
    # Some other project's folder of that name beside the packages is none of ours.
    (tmp_path / "site-packages" / "conf").mkdir()
    monkeypatch.setattr(paths, "__file__", str(package / "paths.py"))
    assert paths.conf_dir() == package / "conf"
