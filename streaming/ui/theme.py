"""Brook's colours and type, for Gradio's components; the rest of the look is in assets/brook.css."""

import gradio as gr

_SANS = ("Inter", "ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")


def build_theme() -> gr.themes.Base:
    """Make the theme. Its fonts are the system's: the page fetches none."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        secondary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.stone,
        radius_size=gr.themes.sizes.radius_lg,
        font=_SANS,
        font_mono=_MONO,
    ).set(
        body_background_fill="#faf9f7",
        body_background_fill_dark="#171715",
        body_text_color="#22211f",
        body_text_color_dark="#ecebe8",
        body_text_color_subdued="#6b6862",
        body_text_color_subdued_dark="#a09d96",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#1e1e1c",
        background_fill_secondary="#f3f1ed",
        background_fill_secondary_dark="#242421",
        border_color_primary="#e4e1da",
        border_color_primary_dark="#35342f",
        color_accent="#0f766e",
        color_accent_soft="#e3f1ee",
        color_accent_soft_dark="#16302d",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_shadow="none",
        block_label_text_size="*text_sm",
        block_title_text_size="*text_sm",
        block_title_text_weight="500",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_info_text_size="*text_xs",
        input_background_fill="#ffffff",
        input_background_fill_dark="#1e1e1c",
        input_border_color="*border_color_primary",
        input_border_color_dark="*border_color_primary",
        input_border_color_focus="#0f766e",
        input_border_color_focus_dark="#4fb3a6",
        input_shadow="none",
        input_shadow_focus="0 0 0 3px #0f766e22",
        button_primary_background_fill="#0f766e",
        button_primary_background_fill_dark="#2a8f84",
        button_primary_background_fill_hover="#0b5f59",
        button_primary_background_fill_hover_dark="#34a598",
        button_primary_text_color="#ffffff",
        button_secondary_background_fill="transparent",
        button_secondary_background_fill_dark="transparent",
        button_secondary_background_fill_hover="#eceae4",
        button_secondary_background_fill_hover_dark="#2b2a27",
        button_secondary_border_color="*border_color_primary",
    )
