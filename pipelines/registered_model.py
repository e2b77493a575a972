"""The MLflow pyfunc of a YAN model, logged from this file's code and the model's safetensors; nothing is pickled."""

from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel


class YanPyfunc(PythonModel):
    """`mlflow.pyfunc.load_model("models:/yan-world@champion").predict(["..."])`."""

    def load_context(self, context) -> None:
        """Load the model folder among the artifacts."""
        import yan_core

        self.generator = yan_core.load(context.artifacts["model"])

    def predict(self, context, model_input: list[str], params=None) -> list[str]:  # type: ignore[override]
        """Answer texts; `params` may name num_steps, max_tokens and seeds."""
        return [answer.text for answer in self.generator.generate(model_input, **(params or {}))]


set_model(YanPyfunc())
