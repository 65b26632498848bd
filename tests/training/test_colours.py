"""A flow transformer of a real class, trained and distilled in seconds: the student beats its teacher at equal NFE."""

from __future__ import annotations

from dataclasses import replace

from training.colours import STUDENT, TeacherConfig, distance, distil, teacher_sampler, train_teacher

CONFIG = replace(STUDENT, steps=60, fake_target="trajectory_score")
MOST_LEFT = {1: 0.75, 2: 0.85, 3: 0.95, 4: 0.95}
"""Step count -> greatest share of the teacher's distance to the data that may be left."""


def test_a_student_of_a_flow_transformer_is_nearer_to_the_data_than_its_teacher_at_equal_steps() -> None:
    teacher = train_teacher(TeacherConfig())
    of_teacher, student = teacher_sampler(teacher), distil(teacher, CONFIG)
    assert distance(of_teacher, 4) < 0.3, "the teacher has learned the colours; untrained it has 1.9"
    for steps, share in MOST_LEFT.items():
        assert distance(student.sample, steps) < share * distance(of_teacher, steps), steps
