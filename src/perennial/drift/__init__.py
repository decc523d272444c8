"""Has the traffic of a model moved away from the rows that it was trained near?"""
