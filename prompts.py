"""Findings as text: wordings, discrete templates, zero-shot prompt sets, and the continuous prompt.

A prompt turns a label into text: a discrete template around the finding's name, and learnable vectors among
the text's embeddings, trained end to end (paper). The vectors stand in front (family: CoOp), and only label
prompts get them (ours). Templates and wordings are ours.
"""

import re

import torch
import torch.nn as nn

# Finding -> its wordings. Training uses the first; the others are synonyms, for zero-shot ensembles and to
# test how much the wording matters. A finding that is not listed is worded as its data set names it.
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

# Finding -> wordings of its absence, where "no" and the wording would be wrong.
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
    """The wordings of a finding -> tuple of str, the trained one first; underscores become spaces."""
    return WORDINGS.get(finding, (finding.replace("_", " "),))


def negations(finding):
    """The wordings of a finding's absence -> tuple of str, as many as there are wordings."""
    without_article = (re.sub(r"^(an?|the) ", "", wording) for wording in wordings(finding))
    return NEGATIONS.get(finding) or tuple(f"no {wording}" for wording in without_article)


def in_template(template, wording):
    """Puts a wording into a template -> str.

    template: a name in TEMPLATES, or any other text with {} where the wording goes.
    """
    return TEMPLATES.get(template, template).replace("{}", wording)


def label_prompt(finding, template):
    """The prompt that training uses for a finding: its first wording in the template -> str."""
    return in_template(template, wordings(finding)[0])


def prompt_set(findings, name, worded=wordings):
    """Zero-shot prompts of each finding.

    Args:
        findings: names.
        name: a template, for one prompt a finding, as in training; or "ensemble", for every wording in every
            template.
        worded: the function wordings, or negations for prompts that say the finding is absent.

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
    """The trained prompt and others that a user might write, most with one change (ours).

    They are: each template with the first wording and with a synonym; the trained prompt in upper case, with
    a capital, with a full stop added or removed, and in quotes; and "negated", which says the opposite.
    Variants of the same text are there once.

    Returns:
        {variant: {finding: [text]}}, the trained prompt first.
    """
    trained = {finding: label_prompt(finding, template) for finding in findings}
    tried = {f"{template}, as trained": trained}
    for name in TEMPLATES:
        for which, change in ((0, ""), (-1, ", synonym")):
            tried[name + change] = {each: in_template(name, wordings(each)[which]) for each in findings}
    changes = {
        "upper case": str.upper,
        "capital": lambda text: text[0].upper() + text[1:],
        "other ending": lambda text: text[:-1] if text.endswith(".") else text + ".",
        "quotes": lambda text: f'"{text}"',
    }
    for change, changed in changes.items():
        tried[f"{template}, {change}"] = {finding: changed(text) for finding, text in trained.items()}
    tried["negated"] = {finding: in_template(template, negations(finding)[0]) for finding in findings}
    found = {}
    for name, texts in tried.items():
        texts = {finding: [text] for finding, text in texts.items()}
        if texts not in found.values():
            found[name] = texts
    return found


class ContinuousPrompt(nn.Module):
    """p_1 ... p_M: learnable vectors among BERT's input embeddings (paper), one set for all findings (CoOp).

    Args:
        length: M, the number of vectors. dim: BERT's hidden size.
    """

    def __init__(self, length, dim):
        super().__init__()
        self.context = nn.Parameter(torch.empty(length, dim))
        nn.init.normal_(self.context, std=0.02)  # family: CoOp; BERT starts its word embeddings so, too

    def forward(self, embeddings, attention_mask):
        """Inserts the vectors right after [CLS]; all tokens stay, in their order.

        Args:
            embeddings: (B, L, dim) float, word embeddings of [CLS], the text, [SEP] and padding.
            attention_mask: (B, L), 1 for a token and 0 for padding.

        Returns:
            embeddings (B, M + L, dim) and attention_mask (B, M + L), with 1 at the vectors.
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
