"""x"""
def consolidate_engine(engine, run_dir, step): pass
