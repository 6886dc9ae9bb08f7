"""Pictures and pages of scores: functions of arrays and labels, independent of models and explanations."""
