"""Pictures and pages of scores: functions of arrays and labels, which know no models or explanations."""
