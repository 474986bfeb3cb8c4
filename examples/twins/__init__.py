"""Parts of `train_twins.py`: corpus, tasks, models, training, step times, judgement."""
