"""The interface of CALVIN's success detection."""


class Tasks:
    def __init__(self, tasks):
        self.tasks = tasks

    def get_task_info_for_set(self, start_info, end_info, task_filter):
        return {
            task
            for task in task_filter
            if task in self.tasks and end_info["drawer"] - start_info["drawer"] > self.tasks[task][0]
        }
