"""Findings as text: wordings, discrete templates, zero-shot prompt sets, and the continuous prompt.

A label becomes text by a prompt (paper): a discrete template around the finding's name, and before it
learnable vectors in place of word embeddings, trained end to end. Templates and wordings are ours.
"""

import re

import torch
import torch.nn as nn

# Finding -> how it may be worded; the first wording is the one that is trained. A finding that is not listed
# is worded by its own name in lower case.
WORDINGS = {
    "No Finding": ("no acute cardiopulmonary abnormality", "normal lungs and heart"),
    "Atelectasis": ("atelectasis", "collapsed lung"),
    "Cardiomegaly": ("cardiomegaly", "an enlarged heart"),
    "Consolidation": ("consolidation", "airspace opacity"),
    "Edema": ("pulmonary edema", "vascular congestion"),
    "Pleural Effusion": ("pleural effusion", "pleural fluid"),
    "Pneumonia": ("pneumonia", "lung infection"),
    "Enlarged Cardiomediastinum": ("an enlarged cardiomediastinum", "a widened mediastinum"),
    "Lung Opacity": ("lung opacity", "opacification of the lung"),
    "Lung Lesion": ("a lung lesion", "a pulmonary nodule or mass"),
    "Pneumothorax": ("pneumothorax", "air in the pleural space"),
    "Pleural Other": ("pleural thickening or scarring", "pleural plaques"),
    "Fracture": ("a fracture", "a broken bone"),
    "Support Devices": ("a support device", "a tube, a line or a pacemaker"),
    "COVID-19": ("COVID-19 pneumonia", "bilateral ground glass opacities"),
    "Head": ("the head", "the brain"),
    "Thorax": ("the thorax", "the chest"),
    "Abdomen": ("the abdomen", "abdominal organs"),
    "Spine and Muscles": ("the spine and muscles", "the musculoskeletal system"),
    "Reproductive and Urinary System": ("the reproductive and urinary system", "the pelvis"),
}

# Finding -> how its absence may be worded, where "no" before the wording would not say it.
NEGATIONS = {
    "No Finding": ("an acute cardiopulmonary abnormality", "abnormal lungs or heart"),
    "Support Devices": ("no support device", "no tube, line or pacemaker"),
}

TEMPLATES = {
    "word": "{}",
    "caption": "a medical image showing {}",
    "report": "Findings: The image demonstrates {}.",
}


def wordings(finding):
    """The ways to say a finding -> tuple of str, the trained one first."""
    return WORDINGS.get(finding, (finding.replace("_", " ").lower(),))


def negations(finding):
    """The ways to say that a finding is absent -> tuple of str, as many as there are wordings."""
    plain = (re.sub(r"^(an?|the) ", "", wording) for wording in wordings(finding))
    return NEGATIONS.get(finding) or tuple(f"no {wording}" for wording in plain)


def in_template(template, wording):
    """A wording in a template of TEMPLATES, by name, or in a text of one's own with {} in it -> str."""
    return TEMPLATES.get(template, template).replace("{}", wording)


def label_prompt(finding, template):
    """The text that a label becomes: the finding's first wording in a template -> str."""
    return in_template(template, wordings(finding)[0])


def prompt_set(findings, name, worded=wordings):
    """Zero-shot prompts of each finding.

    Args:
        findings: names.
        name: a template, for the one prompt that training with it uses, or "ensemble", for every wording in
            every template.
        worded: wordings, or negations for the prompts of a finding's absence.

    Returns:
        {finding: [text, ...]}
    """
    if name != "ensemble":
        return {finding: [in_template(name, worded(finding)[0])] for finding in findings}
    return {
        finding: [in_template(each, wording) for each in TEMPLATES for wording in worded(finding)]
        for finding in findings
    }


def variants(findings, template):
    """The trained prompt and those that one could have written instead, each other by one habit (ours).

    Every template with the first and the last wording; the trained prompt in upper case, with a capital, with
    a full stop or without its own, and in quotes; and "negated", which says the opposite.

    Returns:
        {variant: {finding: [text]}}, the trained prompt first.
    """
    trained = {finding: label_prompt(finding, template) for finding in findings}
    found = {f"{template}, as trained": trained}
    for name in TEMPLATES:
        for which, habit in ((0, ""), (-1, ", synonym")):
            if (name, which) != (template, 0):
                found[name + habit] = {
                    finding: in_template(name, wordings(finding)[which]) for finding in findings
                }
    habits = {
        "upper case": str.upper,
        "capital": lambda text: text[0].upper() + text[1:],
        "other ending": lambda text: text[:-1] if text.endswith(".") else text + ".",
        "quotes": lambda text: f'"{text}"',
    }
    for habit, change in habits.items():
        texts = {finding: change(text) for finding, text in trained.items()}
        if texts != trained:
            found[f"{template}, {habit}"] = texts
    found["negated"] = {finding: in_template(template, negations(finding)[0]) for finding in findings}
    return {name: {finding: [text] for finding, text in texts.items()} for name, texts in found.items()}


class ContinuousPrompt(nn.Module):
    """[p_1 ... p_M]: learnable vectors in BERT's input embeddings, shared by all findings (paper, CoOp).

    Args:
        length: M, the number of vectors. dim: BERT's hidden size.
    """

    def __init__(self, length, dim):
        super().__init__()
        self.context = nn.Parameter(torch.empty(length, dim))
        nn.init.normal_(self.context, std=0.02)  # family: CoOp; BERT's own word embeddings have the same

    def forward(self, embeddings, attention_mask):
        """Inserts the vectors right after [CLS]; no token is written over and none changes its order.

        Args:
            embeddings: (B, L, dim) float, word embeddings of [CLS], the text, [SEP] and padding.
            attention_mask: (B, L).

        Returns:
            the same two, M positions longer; so is what BERT makes of them (umcl.py::TextEncoder).
        """
        B, M = len(embeddings), len(self.context)
        embeddings = torch.cat(
            [
                embeddings[:, :1],  # (B, 1, dim) [CLS]
                self.context.to(embeddings.dtype).expand(B, -1, -1),  # (B, M, dim)
                embeddings[:, 1:],  # (B, L - 1, dim) the text, [SEP], padding
            ],
            dim=1,
        )
        attention_mask = torch.cat([attention_mask.new_ones(B, M), attention_mask], dim=1)
        return embeddings, attention_mask
