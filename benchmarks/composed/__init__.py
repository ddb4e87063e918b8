"""Models composed at random: does the check tell the plans that train wrongly from the right ones?"""
