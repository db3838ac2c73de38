"""The pictures of `octavo analyze`, from nothing but the record that it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..models import ModelError

# Colour-blind safe (Okabe and Ito), with a marker each.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#999999")
_MARKERS = "osD^vPX*"
KINDS = {
    "rows": "#0072B2",
    "columns": "#E69F00",
    "heads": "#009E73",
    "rotary": "#CC79A7",
    "unstructured": "#BBBBBB",
}
FIGURES = ("share_of_sensitivity", "error_rounding", "error_gptq")


def need_matplotlib() -> None:
    """Raises ModelError where it is missing: before minutes of work, not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ModelError("matplotlib is missing: pip install matplotlib") from None


def by_projection(layers: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The layers' entries by projection (its short name), each in order of depth."""
    names = short(list(dict.fromkeys(layer["projection"] for layer in layers)))
    groups: dict[str, list[Mapping[str, Any]]] = {name: [] for name in names.values()}
    for layer in sorted(layers, key=lambda layer: int(layer["depth"])):
        groups[names[layer["projection"]]].append(layer)
    return groups


def short(names: Sequence[str]) -> dict[str, str]:
    """Projections without what they are part of ("self_attn.q_proj" -> "q_proj"), where that leaves them distinct."""
    last = {name: name.replace(name.split(",")[0], name.split(",")[0].rpartition(".")[2], 1) for name in names}
    return last if len(set(last.values())) == len(last) else {name: name for name in names}


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _style(index: int) -> dict[str, Any]:
    return {"color": _COLOURS[index % len(_COLOURS)], "marker": _MARKERS[index % len(_MARKERS)], "markersize": 4}


def _lines(axis: Any, groups: Mapping[str, Sequence[Mapping[str, Any]]], key: str, scale: float = 1.0) -> None:
    """One line over depth for each projection."""
    for index, (name, layers) in enumerate(groups.items()):
        axis.plot([x["depth"] for x in layers], [scale * x[key] for x in layers], label=name, **_style(index))


def _whole_layers(*axes: Any) -> None:
    """There is no layer between two."""
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _nothing(axis: Any, why: str) -> None:
    axis.text(0.5, 0.5, why, ha="center", va="center", transform=axis.transAxes)
    axis.set_xticks([])
    axis.set_yticks([])


def _head(record: Mapping[str, Any]) -> str:
    text = f"{Path(record['text']).name}, {record['windows']} x {record['context']} tokens"
    return f"{record['model']} on {text}: perplexity {record['perplexity']:.2f}"


def activations(record: Mapping[str, Any], others: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Outlier features over depth, dimensions by their shares of layers and positions, and against perplexity."""
    plt = _pyplot()
    seen = record["activations"]
    threshold, criterion = seen["threshold"], seen["criterion"]
    groups = by_projection(seen["layers"])
    figure, axes = plt.subplots(2, 3, figsize=(17, 9.5), layout="constrained")
    reach = f"|x| >= {threshold:g}"

    _lines(axes[0, 0], groups, "dimensions_reaching")
    axes[0, 0].set_yscale("symlog", linthresh=1)
    axes[0, 0].set(title=f"Dimensions with {reach} anywhere", xlabel="layer", ylabel="dimensions")
    axes[0, 0].set_ylim(bottom=0)
    _lines(axes[0, 1], groups, "positions_share", 100)
    axes[0, 1].set(title=f"Positions with {reach} in any dimension", xlabel="layer", ylabel="% of positions")
    _lines(axes[0, 2], groups, "largest")
    axes[0, 2].axhline(threshold, color="black", linestyle=":", label=f"{threshold:g}")
    axes[0, 2].set(title="Largest magnitude", xlabel="layer", ylabel="|x|", yscale="log")

    axis, names = axes[1, 0], short([entry["projection"] for entry in seen["projections"]])
    for index, entry in enumerate(seen["projections"]):
        points = [(100 * d["layers_share"], 100 * d["positions_share"]) for d in entry["dimensions"]]
        if points:
            style = _style(index) | {"linestyle": "", "alpha": 0.6}
            axis.plot(*zip(*points, strict=True), label=names[entry["projection"]], **style)
    if not any(entry["dimensions"] for entry in seen["projections"]):
        axis.text(50, 1, f"none reaches {threshold:g}", ha="center")
    low = (100 * criterion["layers"], 100 * criterion["positions"])
    axis.plot([low[0], low[0], 105], [105, low[1], low[1]], color="black", linestyle=":", label="outlier features")
    axis.set_yscale("symlog", linthresh=0.1)
    axis.set(xlim=(0, 105), ylim=(0, 130))
    axis.set(title=f"Dimensions by where they reach {threshold:g}", xlabel="% of layers", ylabel="% of positions")

    axis = axes[1, 1]
    entry = max(seen["projections"], key=lambda entry: (entry["outlier_features"], len(entry["dimensions"])))
    grid = [[100 * share for share in row] for row in entry["top"]["positions_share"]]
    if grid and grid[0]:
        from matplotlib.colors import SymLogNorm

        image = axis.imshow(grid, aspect="auto", cmap="cividis", norm=SymLogNorm(0.1, vmin=0, vmax=100))
        figure.colorbar(image, ax=axis, label=f"% of positions with {reach}")
        dimensions, depths = entry["top"]["dimensions"], entry["top"]["depths"]
        axis.set_xticks(range(len(dimensions)), dimensions, rotation=90, fontsize="x-small")
        axis.set_yticks(range(len(depths)), depths, fontsize="x-small")
        axis.set_title(f"Dimensions in most layers: input of {names[entry['projection']]}", fontsize="medium")
        axis.set(xlabel="dimension", ylabel="layer")
    else:
        axis.set_title("Dimensions in most layers", fontsize="medium")
        _nothing(axis, f"no dimension reaches {threshold:g} in any layer;\nthe largest magnitude is at the top right")

    _against_perplexity(axes[1, 2], record, others)
    _whole_layers(*axes[0])
    for axis in (*axes[0], axes[1, 0], axes[1, 2]):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="x-small")
    figure.suptitle(f"Activation outliers at the inputs of Linear layers\n{_head(record)}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _against_perplexity(axis: Any, record: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> None:
    for index, one in enumerate((record, *others)):
        style = _style(index) | {"linestyle": ""}
        windows = one["activations"]["windows"]
        pairs = [(window["perplexity"], sum(window["outlier_features"].values())) for window in windows]
        axis.plot(*zip(*pairs, strict=True), alpha=0.5, **style)
        whole = (one["perplexity"], one["activations"]["outlier_features"])
        name = f"{Path(one['model']).name} on {Path(one['text']).name}"
        axis.plot(*whole, **style | {"markersize": 11}, markeredgecolor="black", label=name)
    axis.set(
        title="Outlier features against perplexity\nlarge: the text; small: each window alone",
        xlabel="perplexity",
        ylabel="outlier features, all projections",
    )
    axis.set_ylim(bottom=0)
    axis.margins(x=0.15, y=0.15)


def weights(record: Mapping[str, Any], path: Path) -> None:
    """What the most sensitive weights belong to, and how errors grow with depth and along the order."""
    plt = _pyplot()
    settings = record["weights"]["settings"]
    groups = by_projection(record["weights"]["layers"])
    most = f"{100 * settings['share']:g} %"
    figure, axes = plt.subplots(2, 3, figsize=(17, 9.5), layout="constrained")

    axis, left = axes[0, 0], [0.0] * len(groups)
    for kind, colour in KINDS.items():
        parts = [
            sum(100 * layer["shares"].get(kind, 0.0) for layer in layers) / len(layers) for layers in groups.values()
        ]
        axis.barh(list(groups), parts, left=left, color=colour, label=kind)
        left = [a + b for a, b in zip(left, parts, strict=True)]
    axis.invert_yaxis()
    axis.set(title=f"What the {most} most sensitive weights belong to", xlabel="% of them, mean over layers")
    axis.set_xlim(0, 100)
    axis.legend(fontsize="x-small", ncols=len(KINDS), loc="upper center", bbox_to_anchor=(0.4, -0.12))

    axis = axes[0, 1]
    for index, (name, layers) in enumerate(groups.items()):
        depth, style = [layer["depth"] for layer in layers], _style(index)
        axis.plot(depth, [100 * layer["error_gptq"] for layer in layers], label=name, **style)
        axis.plot(depth, [100 * layer["error_rounding"] for layer in layers], linestyle=":", **style | {"marker": ""})
    title = f"Error of the output at {settings['bits']} bits, groups of {settings['group_size']}"
    axis.set(title=f"{title}\nsolid: GPTQ; dotted: rounding", xlabel="layer", ylabel="% of its square", yscale="log")

    _lines(axes[0, 2], groups, "share_among_most_sensitive", 100)
    axes[0, 2].axhline(100 * settings["share"], color="black", linestyle=":", label="if all layers were alike")
    axes[0, 2].set_yscale("symlog", linthresh=10 * settings["share"])
    axes[0, 2].set_ylim(bottom=0)
    axes[0, 2].set(title=f"Weights among the model's {most} most sensitive", xlabel="layer", ylabel="% of the layer's")

    order = {"act": "by falling diag(X X^T)", "identity": "as stored"}[settings["order"]]
    for axis, key, title, unit, scale in (
        (axes[1, 0], "cost", "Cost of rounding (weights moved so far)", "over that of unmoved weights", None),
        (axes[1, 1], "outliers", f"The {most} costliest weights of a layer", "% of the weights there", 100.0),
    ):
        for index, (name, layers) in enumerate(groups.items()):
            across, values = _along(layers, key, "sensitivity" if scale is None else None, scale or 1.0)
            axis.plot(across, values, label=name, **_style(index))
        axis.set(title=f"{title}\nalong the order of GPTQ", xlabel=f"% of columns, {order}", ylabel=unit)
    axes[1, 0].set_yscale("log")
    axes[1, 1].axhline(100 * settings["share"], color="black", linestyle=":")

    _lines(axes[1, 2], groups, "share_of_sensitivity", 100)
    axes[1, 2].set(title=f"Sensitivity carried by a layer's {most}", xlabel="layer", ylabel="% of the layer's sum")
    _whole_layers(axes[0, 1], axes[0, 2], axes[1, 2])
    for axis in axes.flat[1:]:
        axis.grid(alpha=0.3)
        axis.legend(fontsize="x-small")
    figure.suptitle(f"Sensitive weights\n{_head(record)}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _along(
    layers: Sequence[Mapping[str, Any]], key: str, over: str | None, scale: float
) -> tuple[list[float], list[float]]:
    """Mean over layers of what each has along the order, and where along it, in per cent."""
    count = len(layers[0]["along_order"][key])
    values = []
    for index in range(count):
        parts = [layer["along_order"][key][index] for layer in layers]
        if over is not None:
            unmoved = sum(layer["along_order"][over][index] for layer in layers)
            values.append(sum(parts) / unmoved if unmoved else 1.0)
        else:
            values.append(scale * sum(parts) / len(parts))
    return [100 * (index + 0.5) / count for index in range(count)], values


def maps(record: Mapping[str, Any], path: Path) -> None:
    """Maps of log sensitivity: one row of pictures for each depth that has them, one column per projection."""
    plt = _pyplot()
    drawn = by_projection([layer for layer in record["weights"]["layers"] if "map" in layer])
    depths = sorted({layer["depth"] for layers in drawn.values() for layer in layers})
    size = (2.9 * len(drawn) + 1.5, 3.2 * len(depths) + 1)  # inches
    figure, axes = plt.subplots(len(depths), len(drawn), figsize=size, squeeze=False, layout="constrained")
    image = None
    for axis in axes.flat:
        axis.axis("off")
    for across, (name, layers) in enumerate(drawn.items()):
        for layer in layers:
            axis = axes[depths.index(layer["depth"]), across]
            axis.axis("on")
            image = _map(axis, layer)
            axis.set_title(f"layer {layer['depth']}, {name}", fontsize="small")
    figure.supxlabel("input dimension (column)")
    figure.supylabel("output dimension (row)")
    figure.colorbar(image, ax=axes, label="log10 of sensitivity over the layer's mean", shrink=0.7, extend="both")
    figure.suptitle(f"Where the sensitive weights lie; marks in the margin: attention heads\n{_head(record)}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _map(axis: Any, layer: Mapping[str, Any]) -> Any:
    n, k = layer["shape"]
    cells, heads = layer["map"]["log10_over_mean"], layer["heads"]
    image = axis.imshow(cells, aspect="auto", cmap="cividis", vmin=-1.5, vmax=1.5, extent=(0, k, n, 0))
    if heads:
        rows = heads["along"] == "rows"
        style = {"color": "#D55E00", "clip_on": False, "linewidth": 1}
        for at in range(0, (n if rows else k) + 1, heads["size"]):  # in the margin, where they hide nothing
            axis.plot(*(([-0.02 * k, 0], [at, at]) if rows else ([at, at], [n, 1.02 * n])), **style)
    axis.set(xlim=(0, k), ylim=(n, 0))
    axis.tick_params(labelsize="x-small")
    return image
