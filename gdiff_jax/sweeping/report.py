"""What a sweep leaves to be read: summary.md, quality.png, contact_sheet.png, and labels.png where labels were inferred.

What is printed fits a screen; the tables with quartiles, costs and guarantees are in summary.md.
"""

from __future__ import annotations

from gdiff_jax.sweeping import comparison, drawing, plots, tables, words
from gdiff_jax.sweeping.config import PriorOptions
from gdiff_jax.sweeping.plan import Plan
from gdiff_jax.sweeping.records import Row, Store


def _trials(plan: Plan, images: str) -> str:
    return f"{len(plan.images)} images x {plan.seeds} seeds of {images}"


def _about(plan: Plan, images: str, prior: PriorOptions) -> list[str]:
    sha256, revision = plan.prior.sha256[:12], plan.prior.revision
    of_prior = f"{prior.prior} (sha256 {sha256}{f', revision {revision[:12]}' if revision else ''})"
    return [
        words.threat_model(plan),
        f"Median [quartiles] over {_trials(plan, images)}{words.released(plan)}; prior {of_prior}; "
        f"{prior.steps} steps, {prior.spacing}; {words.settings(plan)}. The scores are of each trial's last image.",
        "Picks: PSNR of one iterate a trial (of its first chain, where it has several), over all its steps: least gradient "
        "distance (attacker), closest to the truth (oracle: no attacker can do that).",
    ]


def write(plan: Plan, images: str, prior: PriorOptions, rows: list[Row], store: Store, quiet: bool = False) -> None:
    """Writes table and pictures into the store's folder, and unless `quiet` prints the medians.

    `images` and `prior` are told as they were asked for.
    """
    mean_rows = tables.mean_image_rows(plan)
    verdicts = comparison.verdicts(rows) if len(plan.methods) > 1 else []
    parts = [tables.table(rows, mean_rows), *_about(plan, images, prior)]
    if verdicts:
        parts += [
            "Methods beside each other: median PSNR with the 95 % interval of a bootstrap over images; wins: on how many "
            "images x seeds a method's PSNR is the highest; time without compiling, of a trial among those computed at a time:",
            comparison.table(rows),
            "\n".join(verdicts),
        ]
    if expectations := tables.expectations(rows):
        parts += [
            "What the attacker expects, without the truth, by each pixel's deviation given the leak. It is right where the "
            "PSNR is the expected one, and 95 % of the pixels err by less than two deviations:",
            expectations,
        ]
    parts += [
        f"Guarantees of one release against every attack, add/remove adjacency, delta {plan.delta:g}:",
        tables.privacy_table(plan),
    ]
    store.write_text("summary.md", "\n\n".join(parts) + "\n")
    epsilon = lambda victim, mechanism, sigma: plan.guarantee(victim, mechanism, sigma).epsilon
    files = [store.folder / "quality.png", store.folder / "contact_sheet.png"]
    with drawing.house_style():
        plots.plot_quality(rows, mean_rows, epsilon, files[0])
        plots.contact_sheet(rows, plan.images, store, files[1])
        if plan.attacker.knowledge.labels != "known":
            files.append(store.folder / "labels.png")
            plots.plot_labels(rows, files[-1])
    if not quiet:
        failed = sum(row["failed"] for row in rows)
        print(
            f"Median PSNR in dB over {_trials(plan, images)}{words.released(plan)}, a column a sigma:",
            tables.brief(rows, mean_rows),
            *([f"{failed} of {len(rows)} trials failed (not finite) and are in no median."] if failed else []),
            *verdicts,
            *tables.epsilons(plan),
            words.threat_model(plan),
            f"In {store.folder}: summary.md (quartiles, SSIM, costs, guarantees), {', '.join(file.name for file in files)}",
            sep="\n",
        )
