def format_result(check_digit):
    return "{}\n".format(check_digit)
