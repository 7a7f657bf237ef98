import io

import matplotlib.pyplot as plt
import torch
from PIL import Image

from softlms.explorer import threshold_explorer
from softlms.pictures import describe_cut, draw_cut

SIGMA = torch.linspace(5, 0.05, 100)


def test_description():
    assert describe_cut(SIGMA, (100, 100), 3.975) == "rank 21 of 100, 4,200 of 10,000 weights kept (42.0%)"
    assert "10,000 of 10,000 weights kept (100.0%)" in describe_cut(SIGMA, (100, 100), 0.0)


def test_moving_the_sliders_changes_picture_and_text():
    plt.close("all")
    alpha, s, text, picture = threshold_explorer(SIGMA, (100, 100)).children
    seen = {(text.value, picture.value)}
    alpha.value = 3.975
    assert "rank 21 of 100" in text.value
    seen.add((text.value, picture.value))
    s.value = 1.0
    seen.add((text.value, picture.value))
    assert len({image for _, image in seen}) == 3
    assert Image.open(io.BytesIO(picture.value)).size[0] > 500
    assert not plt.get_fignums()  # no figure is left open behind the widgets


def test_static_twin_draws_the_same_numbers():
    fig, ax = plt.subplots()
    draw_cut(ax, SIGMA, (100, 100), 3.975, 50)
    assert ax.get_title() == describe_cut(SIGMA, (100, 100), 3.975)
    plt.close(fig)
